"""Every event and object of the Responses API is valid by the official client's own types, read strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from openai.types.responses import Response, ResponsesServerEvent, ResponseStreamEvent
from websockets.sync.client import connect

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Submit, TokenLogprobs, pack_i32
from tests.contract.test_responses import picture_url
from tests.fake_worker import Action, End, FakeWorker, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask

PATH = "/v1/responses"
OURS = {"degas", "stream_id", "headers", "store", "bytes"}
"""What the official types do not declare: additions of ours; `store` and a logprob's `bytes`, which OpenAI's own answers hold."""
OURS_IN_ERRORS = {"type", "param"}

OF_STREAM = pydantic.TypeAdapter[Any](ResponseStreamEvent)
OF_SOCKET = pydantic.TypeAdapter[Any](ResponsesServerEvent)
OF_RESPONSE = pydantic.TypeAdapter[Any](Response)

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
BODIES: dict[str, dict[str, Any]] = {
    "plain": {"input": "hi"},
    "schema": {
        "input": "hi",
        "text": {
            "format": {
                "type": "json_schema",
                "name": "answer",
                "description": "d",
                "strict": True,
                "schema": SCHEMA,
            },
            "verbosity": "low",
        },
    },
    "nameless schema": {"input": "hi", "text": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "json": {"input": "hi", "text": {"format": {"type": "json_object"}}},
    "text": {"input": "hi", "text": {"format": {"type": "text"}, "verbosity": "high"}},
    "reasoning": {
        "input": "hi",
        "reasoning": {"effort": "low", "summary": "auto", "context": "auto", "mode": "pro"},
    },
    "all the rest": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "instructions": "be brief",
        "metadata": {"a": "b"},
        "truncation": "auto",
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "service_tier": "auto",
        "max_tool_calls": 3,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "temperature": 0.5,
        "top_p": 0.5,
        "max_output_tokens": 50,
        "store": False,
        "background": False,
        "tools": [],
    },
    "logprobs": {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "cut": {"input": "hi", "max_output_tokens": 2},
    "points": {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": picture_url()}]}],
        "degas": {"task": "point", "object": "x"},
    },
}


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as worker:
        yield worker


@pytest.fixture(scope="module")
def gateway(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint], request_deadline_s=5) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture(autouse=True)
def fresh_script(worker: FakeWorker) -> None:
    token = text_ids("a")[0]
    logprobs = TokenLogprobs(0, 0, -0.5, pack_i32([token, 11]), [-0.5, -2.0])

    def script(submit: Submit) -> list[Action]:
        if submit.task != "text":
            return [End()]
        wanted = logprobs if submit.sampling.num_logprobs >= 0 else None
        return [*[Token(token, logprob=wanted)] * 3, End()]

    worker.script = script


def extras(value: Any, path: str = "$") -> list[str]:
    """Fields anywhere in a model that its type does not declare, ours left out."""
    found: list[str] = []
    if isinstance(value, pydantic.BaseModel):
        known = OURS | (OURS_IN_ERRORS if type(value).__name__ == "ResponseError" else set())
        found += [f"{path}.{name}" for name in value.model_extra or {} if name not in known]
        for name in type(value).model_fields:
            found += extras(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += extras(item, f"{path}[{index}]")
    return found


def check(adapter: pydantic.TypeAdapter[Any], data: bytes | str) -> dict[str, Any]:
    """Validate one object strictly, and that its optional fields have sound values too."""
    said: dict[str, Any] = json.loads(data)
    if said.get("type") == "degas.object":
        return said
    value = adapter.validate_json(data, strict=True)
    assert extras(value) == []
    return said


def whole(gateway: GatewayThread, body: dict[str, Any]) -> dict[str, Any]:
    """The answer in one piece."""
    answer = ask(gateway.url, PATH, body)
    assert answer.status == 200, answer.body
    return check(OF_RESPONSE, answer.body)


def streamed(gateway: GatewayThread, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events over SSE."""
    with Opened(gateway.url, PATH, {**body, "stream": True}) as opened:
        lines = [line for line in opened.response if line.startswith(b"data: ")]
    return [check(OF_STREAM, line[6:]) for line in lines]


def by_socket(gateway: GatewayThread, body: dict[str, Any], *more: dict[str, Any]) -> list[dict[str, Any]]:
    """The events over the WebSocket, up to the first terminal one."""
    events: list[dict[str, Any]] = []
    with connect(gateway.url.replace("http", "ws") + PATH) as socket:
        socket.send(json.dumps({"type": "response.create", "stream_id": "lane", **body}))
        for message in more:
            socket.send(json.dumps(message))
        while not events or events[-1]["type"] not in (
            "response.completed",
            "response.incomplete",
            "response.failed",
            "error",
        ):
            events.append(check(OF_SOCKET, socket.recv(timeout=10)))
    return events


@pytest.mark.parametrize("name", BODIES)
def test_every_event_and_object_is_valid(gateway: GatewayThread, name: str) -> None:
    body = BODIES[name]
    answers = [
        whole(gateway, body),
        streamed(gateway, body)[-1]["response"],
        by_socket(gateway, body)[-1]["response"],
    ]
    for said in answers:
        asked = body.get("text", {})
        assert said["text"]["verbosity"] == asked.get("verbosity", "medium")
        for key, value in asked.get("format", {}).items():
            assert said["text"]["format"][key] == value
        for key, value in body.get("reasoning", {}).items():
            assert said["reasoning"][key] == value
        for key in (
            "truncation",
            "metadata",
            "instructions",
            "user",
            "top_logprobs",
            "store",
            "service_tier",
        ):
            if key in body:
                expected = "default" if key == "service_tier" else body[key]
                assert said[key] == expected, key


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.DEADLINE, FinishReason.CANCELLED])
def test_responses_cut_short_are_valid(
    gateway: GatewayThread, worker: FakeWorker, reason: FinishReason
) -> None:
    worker.script = lambda _: [Token(text_ids("a")[0]), End(reason)]
    for said in (
        whole(gateway, BODIES["plain"]),
        streamed(gateway, BODIES["plain"])[-1]["response"],
        by_socket(gateway, BODIES["plain"])[-1]["response"],
    ):
        assert said["status"] in ("incomplete", "cancelled")
        assert said["degas"]["finish_reason"] == reason.value


def test_a_cancelled_lane_is_valid(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.script = lambda _: [Token(text_ids("a")[0]), Wait(30), End()]
    events = by_socket(gateway, BODIES["plain"], {"type": "response.cancel", "stream_id": "lane"})
    assert events[-1]["type"] in ("response.incomplete", "error")


@pytest.mark.parametrize("code", [ErrorCode.NUMERICAL_ERROR, ErrorCode.OUT_OF_MEMORY, ErrorCode.QUARANTINED])
def test_failed_responses_are_valid(gateway: GatewayThread, worker: FakeWorker, code: ErrorCode) -> None:
    worker.script = lambda _: [Token(text_ids("a")[0]), Wait(0.05), End(FinishReason.ERROR, code, "broken")]
    for events in (streamed(gateway, BODIES["plain"]), by_socket(gateway, BODIES["plain"])):
        assert events[-1]["type"] == "response.failed"


def test_refusals_on_the_socket_are_valid(gateway: GatewayThread) -> None:
    for body in ({"input": "hi", "tools": [{}]}, {"input": "hi", "model": "none"}, {"input": 5}):
        (event,) = by_socket(gateway, body)
        assert event["type"] == "error" and event["stream_id"] == "lane"
