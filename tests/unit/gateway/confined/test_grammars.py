"""Structured output at the gateway: every field that asks for it, and hostile grammars refused fast."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.confined.compilers import Compilers
from gateway.confined.grammars import GrammarChecker
from gateway.generation import RequestError
from shared.errors import ErrorCode
from shared.protocol import Grammar
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import ask
from tests.unit.gateway.transport.test_boundary import CHAT, chat

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker()
    yield checker
    await checker.stop()


async def refusal(checker: GrammarChecker, kind: str, source: str) -> RequestError:
    with pytest.raises(RequestError) as refused:
        await checker.check(Grammar(kind, source), param="p")
    return refused.value


def deep_schema(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


BOMBS = {
    "nested repeats": ("regex", "(a{1,1000}){1,1000}"),
    "a pattern's repeats": ("json_schema", '{"type":"string","pattern":"((x{1,999}){1,999}){9}"}'),
    "parentheses": ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "deep schema": ("json_schema", deep_schema(64)),
    "brackets": ("json_schema", "[" * 60_000),
    "huge": ("regex", "a|" * 40_000),
    "all of many": (
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmno"]}),
    ),
    "no way out": ("lark", 'start: "a" start'),
    "doubling": ("lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "x"'),
    "unfinished": ("lark", 'start: "a'),
    "half a surrogate": ("regex", "\ud800"),
}  # fmt: skip


@pytest.mark.slow
async def test_bombs_are_refused(checker: GrammarChecker) -> None:
    for name, (kind, source) in BOMBS.items():
        error = await refusal(checker, kind, source)
        assert error.code is ErrorCode.INVALID_GRAMMAR and error.param == "p", name
        assert error.message.startswith("p: the grammar cannot be used: ") and len(error.message) < 500, name


async def test_verdicts_are_remembered_and_bounded(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.confined.grammars.MAX_VERDICTS", 20)
    for _ in range(3):
        assert await checker.check(Grammar("regex", "a+"), param="p") == Grammar("regex", "a+")
        await refusal(checker, "regex", "(")
    assert checker.num_compiled == 2
    for number in range(25):
        await checker.check(Grammar("regex", f"a{number}"), param="p")
    assert len(checker._verdicts) == 20


async def test_the_same_grammar_at_once_is_compiled_once(checker: GrammarChecker) -> None:
    await asyncio.gather(*(checker.check(Grammar("choice", '["a"]'), param="p") for _ in range(20)))
    assert checker.num_compiled == 1


async def test_gbnf_is_turned_into_lark(checker: GrammarChecker) -> None:
    grammar = await checker.check(Grammar("lark", 'root ::= "yes" | "no"'), param="p")
    assert "start" in grammar.source and "::=" not in grammar.source


@pytest.mark.slow
async def test_a_stuck_process_is_replaced_and_the_job_done() -> None:
    checker = GrammarChecker(Compilers(patience=2.0))
    await checker.check(Grammar("regex", "a"), param="p")
    (process,) = checker.compilers.quick.processes
    os.kill(process.pid, signal.SIGSTOP)
    assert await checker.check(Grammar("regex", "b"), param="p")
    await checker.stop()


async def test_a_killed_process_costs_no_grammar(checker: GrammarChecker) -> None:
    await checker.check(Grammar("regex", "a"), param="p")
    for number in range(3):
        for process in checker.compilers.quick.processes:
            process.kill()
        assert await checker.check(Grammar("regex", f"b{number}"), param="p")


@pytest.mark.slow
async def test_slow_grammars_hold_nobody_and_are_remembered() -> None:
    """Eight that are cut and one that is not, of another tenant and of the same."""
    compilers = Compilers(quick_cpu_s=0.05, cpu_s=0.1)
    checker = GrammarChecker(compilers)
    await checker.check(Grammar("regex", "a"), param="p")
    order: list[str] = []

    async def ask_for(name: str, kind: str, source: str, tenant: str) -> None:
        try:
            await checker.check(Grammar(kind, source), param="p", tenant=tenant)
        except RequestError as error:
            assert "longer than 0.1 s" in error.message
        order.append(name)

    jobs = [ask_for("slow", "regex", slow_regex(i), "one") for i in range(8)]
    jobs += [ask_for("ordinary", "json_schema", json.dumps(SCHEMA), "other")]
    jobs += [ask_for("ordinary", "regex", "b", "one")]
    await asyncio.gather(*jobs)
    assert order.count("slow") == 8 and "ordinary" in order[:3]
    num_compiled = checker.num_compiled
    await ask_for("slow", "regex", slow_regex(3), "third")
    assert checker.num_compiled == num_compiled, "the refusal was forgotten"
    await checker.stop()


def slow_regex(number: int) -> str:
    """Some seconds of CPU time."""
    return f"(?:[a-z]{{1,90}}[0-9]){{1,90}}(?:x|y{{{number + 1}}}){{900}}.*q.{{60}}"


async def test_the_time_of_a_compile_is_cpu_time(checker: GrammarChecker) -> None:
    """A machine that stands still for longer than the limit refuses nothing."""
    await checker.check(Grammar("regex", "a"), param="p")
    (process,) = checker.compilers.quick.processes
    os.kill(process.pid, signal.SIGSTOP)
    job = asyncio.create_task(checker.check(Grammar("regex", "b"), param="p"))
    await asyncio.sleep(2 * checker.compilers.quick.cpu_s)
    os.kill(process.pid, signal.SIGCONT)
    assert await job == Grammar("regex", "b")


async def test_too_many_waiting_are_refused(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.confined.grammars.MAX_PENDING_EACH", 3)
    jobs = [checker.check(Grammar("regex", f"x{i}"), param="p", tenant="one") for i in range(6)]
    other = checker.check(Grammar("regex", "y"), param="p", tenant="other")
    results = await asyncio.gather(*jobs, other, return_exceptions=True)
    busy = [error for error in results if isinstance(error, RequestError)]
    assert len(busy) == 3 and all(error.code is ErrorCode.QUEUE_FULL for error in busy)
    assert results[-1] == Grammar("regex", "y")


async def test_verdicts_are_bounded_in_bytes(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.confined.grammars.MAX_VERDICT_BYTES", 2000)
    for number in range(6):
        await checker.check(Grammar("regex", f"x{number}" * 200), param="p")
    assert checker._verdict_bytes <= 2000 and 0 < len(checker._verdicts) < 6


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", "{}"),
        ({"guided_json": SCHEMA}, "json_schema", '"integer"'),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", '"integer"'),
        ({"guided_regex": r"\d+"}, "regex", r"\d+"),
        ({"guided_choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", '"integer"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", "{}"),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a"),
        ({"structured_outputs": {"choice": ["x"]}}, "choice", '["x"]'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "lark", "start"),
    ],
)
def test_every_name_of_it_reaches_the_worker(
    gateway: GatewayThread, worker: FakeWorker, fields: dict[str, Any], kind: str, source: str
) -> None:
    worker.reply("x")
    assert ask(gateway.url, CHAT, chat(**fields)).status == 200
    grammar = worker.submits[0].grammar
    assert grammar is not None and grammar.kind == kind and source in grammar.source


def test_strict_false_ignores_what_cannot_be_kept(gateway: GatewayThread, worker: FakeWorker) -> None:
    def body(strict: bool | None) -> Any:
        schema = {"name": "x", "strict": strict, "schema": {"type": "string", "pattern": "^(?!x).*$"}}
        return chat(response_format={"type": "json_schema", "json_schema": schema})

    for strict in (True, None):
        answer = ask(gateway.url, CHAT, body(strict))
        assert answer.status == 400 and "looks ahead" in answer.error["message"]
        assert answer.error["param"] == "response_format.json_schema.schema"
        assert answer.error["code"] == "invalid_grammar"
    worker.reply("x")
    assert ask(gateway.url, CHAT, body(False)).status == 200
    assert "lenient" in (worker.submits[0].grammar or Grammar("", "")).source


def test_a_json_object_with_a_schema_keeps_it(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.reply("x")
    asked = {"type": "json_object", "schema": SCHEMA}
    assert ask(gateway.url, CHAT, chat(response_format=asked)).status == 200
    grammar = worker.submits[0].grammar
    assert grammar is not None and grammar.kind == "json_schema" and '"integer"' in grammar.source
    answer = ask(gateway.url, CHAT, chat(response_format=asked | {"schema": {"type": "nonsense"}}))
    assert answer.status == 400 and answer.error["param"] == "response_format.schema"


def test_annotations_do_not_count(gateway: GatewayThread, worker: FakeWorker) -> None:
    long = {
        "title": "t" * 300_000,
        "description": "d" * 300_000,
        "default": "x" * 300_000,
        "examples": ["e" * 90_000],
    }
    worker.reply("x")
    assert ask(gateway.url, CHAT, chat(guided_json=SCHEMA | long | {"$comment": "c" * 90_000})).status == 200
    assert len((worker.submits[0].grammar or Grammar("", "")).source) < 200
    large = {"enum": [f"{i:05d}" for i in range(40_000)]}
    answer = ask(gateway.url, CHAT, chat(guided_json=large))
    assert answer.status == 400 and "262144 bytes, annotations not counted" in answer.error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_json": "nonsense"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_wrong_ones_name_the_field(gateway: GatewayThread, fields: dict[str, Any], param: str) -> None:
    answer = ask(gateway.url, CHAT, chat(**fields))
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param, answer.error


def test_completions_take_them_too(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.reply("x")
    body = {"model": "fake-vl", "prompt": "x", "guided_choice": ["x"]}
    assert ask(gateway.url, "/v1/completions", body).status == 200
    assert worker.submits[0].grammar == Grammar("choice", '["x"]')
