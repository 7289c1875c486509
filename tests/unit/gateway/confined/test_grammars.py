"""Structured output at the gateway: every field that asks for it, and hostile grammars refused fast."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.confined.grammars import MAX_VERDICTS, GrammarChecker
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


@pytest.mark.parametrize("name", BOMBS)
async def test_bombs_are_refused_fast(checker: GrammarChecker, name: str) -> None:
    await checker.check(Grammar("regex", "a"), param="p")  # the process is there
    started_s = time.perf_counter()
    error = await refusal(checker, *BOMBS[name])
    assert time.perf_counter() - started_s < 2.5
    assert error.code is ErrorCode.INVALID_GRAMMAR and error.param == "p"
    assert error.message.startswith("p: the grammar cannot be used: ") and len(error.message) < 500


async def test_verdicts_are_remembered_and_bounded(checker: GrammarChecker) -> None:
    for _ in range(3):
        assert await checker.check(Grammar("regex", "a+"), param="p") == Grammar("regex", "a+")
        await refusal(checker, "regex", "(")
    assert checker.num_compiled == 2
    for number in range(MAX_VERDICTS + 10):
        await checker.check(Grammar("regex", f"a{number}"), param="p")
    assert len(checker._verdicts) == MAX_VERDICTS


async def test_the_same_grammar_at_once_is_compiled_once(checker: GrammarChecker) -> None:
    await asyncio.gather(*(checker.check(Grammar("choice", '["a"]'), param="p") for _ in range(20)))
    assert checker.num_compiled == 1


async def test_gbnf_is_turned_into_lark(checker: GrammarChecker) -> None:
    grammar = await checker.check(Grammar("lark", 'root ::= "yes" | "no"'), param="p")
    assert "start" in grammar.source and "::=" not in grammar.source


async def test_a_stuck_process_is_killed_and_replaced() -> None:
    checker = GrammarChecker(timeout_s=0.2)
    await checker.check(Grammar("regex", "a"), param="p")
    assert checker.process is not None
    os.kill(checker.process.pid, signal.SIGSTOP)
    started_s = time.perf_counter()
    error = await refusal(checker, "regex", "b")
    assert "longer than 0.2 s" in error.message and time.perf_counter() - started_s < 1.0
    assert await checker.check(Grammar("regex", "c"), param="p")
    await checker.stop()


async def test_a_dead_process_costs_one_grammar(checker: GrammarChecker) -> None:
    await checker.check(Grammar("regex", "a"), param="p")
    assert checker.process is not None
    checker.process.kill()
    await checker.process.wait()
    assert await checker.check(Grammar("regex", "b"), param="p")


async def test_too_many_waiting_are_refused(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.confined.grammars.MAX_PENDING", 3)
    jobs = [checker.check(Grammar("regex", f"x{i}"), param="p") for i in range(6)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    busy = [error for error in results if isinstance(error, RequestError)]
    assert len(busy) == 3 and all(error.code is ErrorCode.QUEUE_FULL for error in busy)


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
        schema = {"name": "x", "strict": strict, "schema": {"type": "string", "format": "unheard-of"}}
        return chat(response_format={"type": "json_schema", "json_schema": schema})

    for strict in (True, None):
        answer = ask(gateway.url, CHAT, body(strict))
        assert answer.status == 400 and "unheard-of" in answer.error["message"]
        assert answer.error["param"] == "response_format.json_schema.schema"
        assert answer.error["code"] == "invalid_grammar"
    worker.reply("x")
    assert ask(gateway.url, CHAT, body(False)).status == 200
    assert "lenient" in (worker.submits[0].grammar or Grammar("", "")).source


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
