"""llguidance's constraints: what they allow validates, each token counts once, ends absorb, bombs are refused."""

from __future__ import annotations

import json
import random
import re
import resource
import time

import jsonschema
import numpy as np
import pytest

from shared.grammars import ESCAPES, MAX_CHOICES, GrammarError, ascii_classes, check_repeats, spell
from shared.protocol import Grammar
from worker.constraints.constraint import Constraint
from worker.constraints.llg import LlgConstraint, Vocabulary, compile_llg
from worker.sim.tokenizer import FIRST_BYTE_ID, SIM_TOKENIZER, VOCAB_SIZE

END = 0
NUM_WORDS = (VOCAB_SIZE + 31) // 32
VOCABULARY = Vocabulary(SIM_TOKENIZER, VOCAB_SIZE, [END])

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
        "pet": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pet"}]},
    },
    "required": ["name", "age", "pet"],
    "additionalProperties": False,
    "$defs": {"pet": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}},
}


def allowed(constraint: Constraint) -> list[int]:
    words = np.zeros(NUM_WORDS, np.int32)
    constraint.fill_mask(words)
    return [int(i) for i in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def walk(constraint: Constraint, rng: random.Random, max_steps: int = 400) -> tuple[bytes, bool]:
    """Random allowed tokens to the end; an end is taken as soon as it may come after some steps."""
    out = bytearray()
    for step in range(max_steps):
        ids = allowed(constraint)
        token_id = END if END in ids and (step > 60 or rng.random() < 0.3) else rng.choice(ids)
        if step > 60 and token_id != END:  # towards an end: closing characters first
            closing = [i for i in ids if bytes([i - FIRST_BYTE_ID]) in b'"}],:' and i >= FIRST_BYTE_ID]
            token_id = closing[0] if closing else token_id
        constraint.advance(token_id)
        if token_id == END:
            return bytes(out), True
        out.append(token_id - FIRST_BYTE_ID)
    return bytes(out), False


def test_random_walks_of_a_schema_validate() -> None:
    rng = random.Random(1)
    start = compile_llg(Grammar("json_schema", json.dumps(PERSON)), VOCABULARY)
    num_ended = 0
    for _ in range(40):
        text, ended = walk(start.fork(), rng)
        if ended:
            num_ended += 1
            jsonschema.validate(json.loads(text), PERSON)
    assert num_ended > 20


def test_json_object_is_an_object() -> None:
    rng = random.Random(2)
    start = compile_llg(Grammar("json_object", ""), VOCABULARY)
    for _ in range(20):
        text, ended = walk(start.fork(), rng, 200)
        assert text.startswith(b"{")
        if ended:
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("pattern", [r"\d{3}-\w+", r"a/b|c\/d", r"[\w.]+@[\w]+", "x\ny"])
def test_random_walks_of_a_regex_match_in_ascii(pattern: str) -> None:
    rng = random.Random(3)
    start = compile_llg(Grammar("regex", pattern), VOCABULARY)
    for _ in range(10):
        text, ended = walk(start.fork(), rng, 100)
        assert ended is False or re.fullmatch(pattern, text.decode(), re.ASCII)


def test_choices_and_lark() -> None:
    rng = random.Random(4)
    choices = ["red", "green", "red wine", 'q"\\\n', "grün"]
    start = compile_llg(Grammar("choice", json.dumps(choices)), VOCABULARY)
    seen = {walk(start.fork(), rng)[0].decode() for _ in range(100)}
    assert seen == set(choices)
    lark = 'start: "(" start ")" | "x"'
    start = compile_llg(Grammar("lark", lark), VOCABULARY)
    for _ in range(10):
        text, ended = walk(start.fork(), rng, 100)
        assert not ended or text.count(b"(") == text.count(b")")


def test_an_end_absorbs_and_a_refused_token_raises() -> None:
    constraint = compile_llg(Grammar("regex", "ab?"), VOCABULARY)
    with pytest.raises(ValueError):
        constraint.fork().advance(END)
    constraint.advance(FIRST_BYTE_ID + ord("a"))
    assert not constraint.is_complete()
    constraint.advance(END)
    for _ in range(5):
        assert constraint.is_complete()
        assert allowed(constraint) == [END]
        constraint.advance(END)
    with pytest.raises(ValueError):
        constraint.advance(FIRST_BYTE_ID + ord("b"))


def test_complete_before_the_end_token() -> None:
    constraint = compile_llg(Grammar("regex", "ab"), VOCABULARY)
    for char in "ab":
        assert not constraint.is_complete()
        constraint.advance(FIRST_BYTE_ID + ord(char))
    assert constraint.is_complete() and allowed(constraint) == [END]


def test_forks_are_independent() -> None:
    start = compile_llg(Grammar("regex", "(ab|cd)"), VOCABULARY)
    one, two = start.fork(), start.fork()
    one.advance(FIRST_BYTE_ID + ord("a"))
    two.advance(FIRST_BYTE_ID + ord("c"))
    assert allowed(one) == [FIRST_BYTE_ID + ord("b")] and allowed(two) == [FIRST_BYTE_ID + ord("d")]
    assert len(allowed(start)) == 2


def deep_schema(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


BOMBS = {
    "nested repeats": Grammar("regex", "(a{1,1000}){1,1000}"),
    "thrice nested": Grammar("regex", "((a{1,100}){1,100}){1,100}"),
    "one huge repeat": Grammar("regex", "a{999999999}"),
    "parentheses": Grammar("regex", "(" * 3000 + "a" + ")" * 3000),
    "too long": Grammar("regex", "a" * 70_000),
    "pattern in a schema": Grammar("json_schema", '{"type":"string","pattern":"((x{1,999}){1,999}){9}"}'),
    "deep schema": Grammar("json_schema", deep_schema(40)),
    "very deep": Grammar("json_schema", "[" * 60_000),
    "too many choices": Grammar("choice", json.dumps([str(i) for i in range(MAX_CHOICES + 1)])),
    "no choice": Grammar("choice", "[]"),
    "empty choice": Grammar("choice", '["a",""]'),
    "not JSON": Grammar("json_schema", "{"),
    "all of many": Grammar(
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmno"]}),
    ),
    "unknown rule": Grammar("lark", "start: nothing"),
    "unclosed": Grammar("regex", "(a"),
    "half a surrogate": Grammar("regex", "\ud800"),
    "unknown kind": Grammar("yacc", "start: 1"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_fast_and_with_flat_memory(name: str) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.process_time()
    with pytest.raises(GrammarError) as refused:
        compile_llg(BOMBS[name], VOCABULARY)
    assert 0 < len(str(refused.value)) <= 400
    assert time.process_time() - started_s < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 128 << 10


def test_a_grammar_that_grows_beyond_limits_fails_alone() -> None:
    rules = "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60))
    constraint = compile_llg(Grammar("lark", f'start: a0\n{rules}\na60: "x"'), VOCABULARY)
    started_s = time.process_time()
    with pytest.raises(ValueError, match=r"too|limit"):
        for _ in range(2000):
            constraint.advance(allowed(constraint)[0])
    assert time.process_time() - started_s < 5.0


def test_ascii_classes_leave_the_rest_alone() -> None:
    assert ascii_classes(r"\d[\w-]\S\.[^\d]") == r"[0-9][A-Za-z0-9_-][^ \t\n\r\f\v]\.[^0-9]"
    assert ascii_classes(r"[\D]") == r"[\D]"
    assert ascii_classes("\\\\d") == "\\\\d"


def test_ordinary_repeats_pass() -> None:
    for pattern in (r"\d{1,1000}", r"(\w{1,64} ){1,100}", r"[^{}]{3}", r"\{a{2}\}", "a{,5}"):
        check_repeats(pattern)


def test_spelling_ignores_the_clients_own_options() -> None:
    source = '{"type":"null","x-guidance":{"whitespace_pattern":"x*","lenient":true}}'
    spelled = json.loads(spell(Grammar("json_schema", source)))["grammars"][0]["json_schema"]
    assert spelled["x-guidance"] == {
        "whitespace_pattern": "[ ]?",
        "lenient": True,
        "json_allowed_escapes": ESCAPES,
    }


def test_types() -> None:
    assert isinstance(compile_llg(Grammar("regex", "a"), VOCABULARY), LlgConstraint)
