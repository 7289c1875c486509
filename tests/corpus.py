"""A corpus of JSON schemas against structured output: what compiles, what is refused and why, and whether answers validate.

`python -m tests.corpus FOLDER` reads `*.json` (a schema each) and `*.jsonl` (a schema a line, or an object with one under
`json_schema`, as a text or not). Each schema is judged as the gateway does it, strictly and leniently, within its limits of CPU
time; of each that compiles strictly some complete answers are drawn at random and checked with jsonschema.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
from jsonschema.validators import validator_for

from gateway.confined.compilers import CPU_S
from gateway.confined.grammar_process import judge
from shared.forked_jobs import CUT, DONE, run_forked
from shared.grammars import limits_of, spell
from shared.protocol import Grammar

MAX_BYTES = 700


@dataclass(slots=True)
class Found:
    """What became of one schema."""

    name: str
    strict: str  # "" or why it is refused
    lenient: str
    num_answers: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)  # an answer and what its schema has against it
    failed: str = ""  # an accepted grammar that failed in the middle of an answer
    cpu_s: float = 0.0


class Checked(msgspec.Struct):
    """What the forked job says of a schema."""

    strict: str
    lenient: str
    num_answers: int = 0
    wrong: list[tuple[str, str]] = []
    failed: str = ""


def schemas_in(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every schema below a folder, with a name."""
    for path in sorted(folder.rglob("*.json")) + sorted(folder.rglob("*.jsonl")):
        name = str(path.relative_to(folder))
        texts = [path.read_bytes()] if path.suffix == ".json" else path.read_bytes().splitlines()
        for number, text in enumerate(texts):
            try:
                schema = json.loads(text)
                if isinstance(schema, dict) and "json_schema" in schema:
                    inner = schema["json_schema"]
                    schema = json.loads(inner) if isinstance(inner, str) else inner
            except ValueError:
                continue
            if isinstance(schema, dict):
                yield (name if path.suffix == ".json" else f"{name}:{number + 1}"), schema


@lru_cache
def _tokenizer() -> Any:
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    judge(Grammar("json_object", "{}"), tokenizer)
    return tokenizer


def draw(source: str, rng: random.Random, max_bytes: int = MAX_BYTES) -> tuple[str | None, str]:
    """A complete answer to a prepared schema, drawn at random through its masks; None where it became too long. The second is
    the error of a grammar that failed under way."""
    from llguidance import LLMatcher, LLParserLimits

    tokenizer = _tokenizer()
    grammar = Grammar("json_schema", source)
    matcher = LLMatcher(
        tokenizer, spell(grammar), log_level=0, limits=LLParserLimits(**limits_of(grammar, running=True))
    )
    out = bytearray()
    end = tokenizer.eos_token
    while len(out) < max_bytes:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            return None, matcher.get_error().split("<state>")[0][:300]
        allowed = [i for i in range(tokenizer.vocab_size) if mask >> i & 1]
        if end in allowed and (len(allowed) == 1 or len(out) > 200 or rng.random() < 0.5):
            return out.decode(), ""
        chars = [i for i in allowed if i != end]
        late = len(out) > 120
        closing = [i for i in chars if i in b'"}]']
        if closing and (late or rng.random() < 0.3):
            token = rng.choice(closing)
        elif late and ord(",") in chars and len(chars) > 1 and any(i != ord(",") for i in chars):
            token = rng.choice([i for i in chars if i != ord(",")])
        else:
            token = rng.choice(chars)
        if not matcher.consume_token(token):
            return None, matcher.get_error().split("<state>")[0][:300]
        out.append(token)
    return None, ""


def complaint(schema: Any, text: str) -> str:
    """What a schema's own validator has against an answer; "" for nothing. Numbers are compared as decimals."""
    try:
        exact = json.loads(json.dumps(schema), parse_float=Decimal)
        value = json.loads(text, parse_float=Decimal)
        validator = validator_for(exact, default=jsonschema.Draft202012Validator)(exact)
        for error in validator.iter_errors(value):
            return f"{'/'.join(map(str, error.absolute_schema_path))}: {error.message}"[:300]
    except jsonschema.ValidationError as error:
        return str(error.message)[:300]
    except (InvalidOperation, OverflowError):
        return ""
    except Exception as error:  # the schema is none: its validator cannot say anything
        return "" if not isinstance(error, json.JSONDecodeError) else f"not JSON: {text[:100]}"
    return ""


def check(schema: Any, samples: int, seed: int) -> Checked:
    """Judge one schema and draw answers to it."""
    text = json.dumps(schema, ensure_ascii=False)
    strict = judge(Grammar("json_schema", text), _tokenizer())
    if strict.error:
        lenient = judge(
            Grammar(
                "json_schema", json.dumps({**schema, "x-guidance": {"lenient": True}}, ensure_ascii=False)
            ),
            _tokenizer(),
        )
        return Checked(strict.error, lenient.error)
    said = Checked("", "")
    rng = random.Random(seed)
    for _ in range(samples):
        answer, failed = draw(strict.source, rng)
        said.failed = said.failed or failed
        if answer is not None:
            said.num_answers += 1
            wrong = complaint(schema, answer)
            if wrong:
                said.wrong.append((answer, wrong))
    return said


def _one(job: tuple[str, Any, int, int]) -> Found:
    name, schema, samples, seed = job
    _tokenizer()

    def work(_: bytes) -> bytes:
        return msgspec.msgpack.encode(check(schema, samples, seed))

    outcome, data = run_forked(work, b"", CPU_S * (2 + samples))
    if outcome.how != DONE:
        why = (
            f"longer than {CPU_S:g} s of CPU time"
            if outcome.how == CUT
            else f"the process died ({outcome.signal})"
        )
        return Found(name, why, why, cpu_s=outcome.cpu_s)
    said = msgspec.msgpack.decode(data, type=Checked)
    return Found(
        name, said.strict, said.lenient, said.num_answers, list(said.wrong), said.failed, outcome.cpu_s
    )


def kind_of(reason: str) -> str:
    """A refusal's reason without what is particular to its schema."""
    for mark in ("Unimplemented keys", "oneOf: "):
        if reason.startswith(mark):
            return reason[:60] if mark == "Unimplemented keys" else "oneOf: branches overlap"
    return reason.split(":")[0].split("'")[0].split('"')[0][:60]


def main(arguments: list[str]) -> int:
    """Run it; 1 when an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.corpus", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=3, help="answers drawn of each schema")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1800.0, help="stop after so long")
    parser.add_argument("--every", type=int, default=1, help="take each n-th schema only")
    parser.add_argument("--details", type=Path, help="write what became of each schema, a line of JSON each")
    options = parser.parse_args(arguments)
    until_s = time.monotonic() + options.seconds
    jobs = (
        (name, schema, options.samples, number)
        for number, (name, schema) in enumerate(schemas_in(options.folder))
        if number % options.every == 0
    )
    found: list[Found] = []
    with ProcessPoolExecutor(options.processes) as pool:
        batch: list[tuple[str, Any, int, int]] = []
        for job in jobs:
            batch.append(job)
            if len(batch) == 200:
                found += pool.map(_one, batch, chunksize=10)
                batch = []
                if time.monotonic() > until_s:
                    break
        found += pool.map(_one, batch, chunksize=10)
    report(found)
    if options.details is not None:
        with options.details.open("w") as file:
            for one in found:
                file.write(
                    json.dumps(
                        [one.name, one.strict, one.lenient, one.num_answers, one.wrong, one.failed, one.cpu_s]
                    )
                    + "\n"
                )
    return int(any(one.wrong or one.failed for one in found))


def report(found: list[Found]) -> None:
    """Print the figures."""
    num = len(found) or 1
    strict = sum(not one.strict for one in found)
    either = sum(not (one.strict and one.lenient) for one in found)
    answers = sum(one.num_answers for one in found)
    print(f"{len(found)} schemas")
    print(f"  {strict / num:6.1%}  compile strictly")
    print(f"  {either / num:6.1%}  compile one way or the other")
    print(f"{answers} complete answers, {sum(len(one.wrong) for one in found)} refused by their own schema")
    print(f"{sum(bool(one.failed) for one in found)} accepted grammars failed in the middle of an answer")
    times = sorted(one.cpu_s for one in found)
    if times:
        print(
            f"CPU time with answers: median {times[len(times) // 2]:.3f} s, 99 % {times[int(0.99 * (len(times) - 1))]:.3f} s"
        )
    print("refused strictly:")
    for reason, count in Counter(kind_of(one.strict) for one in found if one.strict).most_common(25):
        print(f"  {count:5}  {reason}")
    print("refused leniently:")
    for reason, count in Counter(kind_of(one.lenient) for one in found if one.lenient).most_common(15):
        print(f"  {count:5}  {reason}")
    for one in found:
        for answer, wrong in one.wrong[:1]:
            print(f"WRONG {one.name}: {wrong}\n      {answer[:200]}")
        if one.failed:
            print(f"FAILED {one.name}: {one.failed}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
