"""Tools and thinking over `/v1/responses` by the official `openai` client: whole, streamed, over the WebSocket, two turns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.lib.responses_websocket import ResponsesWebSocketAccumulator
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseReasoningItem,
    ResponsesServerEvent,
    ResponseStreamEvent,
)
from websockets.sync.client import connect

from tests.contract.chat_model import chat_model
from tests.fake_worker import FakeWorker, ids_text
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask

pytestmark = pytest.mark.slow

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "The sky over a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
THOUGHT = "<think>\nhm\n</think>\n\n"
IN_PARTS = f"{THOUGHT}Let me look.\n{CALL}\n{CALL}"
RESPONSES = "/v1/responses"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[GatewayThread, FakeWorker]]:
    with chat_model() as (gateway, worker):
        yield gateway, worker


@pytest.fixture
def gateway(served: tuple[GatewayThread, FakeWorker]) -> GatewayThread:
    return served[0]


@pytest.fixture
def worker(served: tuple[GatewayThread, FakeWorker]) -> FakeWorker:
    served[1].submits.clear()
    return served[1]


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt(worker: FakeWorker) -> str:
    """What the worker was asked last."""
    from shared.protocol import unpack_i32

    return ids_text(unpack_i32(worker.submits[-1].prompt).tolist())


def check_output(response: Any) -> ResponseFunctionToolCall:
    """The output of `IN_PARTS`; returns its first call."""
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    thought, _, call, other = response.output
    assert isinstance(thought, ResponseReasoningItem) and thought.content is not None
    assert [part.text for part in thought.content] == ["hm"] and thought.summary == []
    assert response.output_text == "Let me look."
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Oslo"}, "completed")
    assert call.call_id != other.call_id and call.id != other.id
    assert isinstance(call, ResponseFunctionToolCall)
    return call


def test_whole_and_by_the_stream_helper(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply(IN_PARTS)
    answer = client.responses.create(model="fake-vl", input="rain?", tools=[TOOL])
    check_output(answer)
    assert '"name": "weather"' in prompt(worker) and answer.status == "completed"
    (tool,) = answer.tools
    assert tool.type == "function" and tool.name == "weather" and tool.parameters == TOOL["parameters"]
    assert (answer.tool_choice, answer.parallel_tool_calls) == ("auto", True)
    with client.responses.stream(model="fake-vl", input="rain?", tools=[TOOL]) as stream:
        events = list(stream)
        check_output(stream.get_final_response())
    snapshots = [e.snapshot for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads(snapshots[-1]) == {"city": "Oslo"}
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "hm"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Let me look."


def test_the_same_over_the_websocket(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply(IN_PARTS)
    with client.responses.connect() as connection:
        connection.response.create(model="fake-vl", input="rain?", tools=[TOOL], stream_id="a")
        accumulator = ResponsesWebSocketAccumulator()
        for event in connection:
            accumulator.add_event(event)
            if event.type == "response.completed":
                break
    check_output(accumulator.get_final_response())


def test_two_turns_by_the_items_themselves(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply(IN_PARTS)
    history: list[Any] = [{"role": "user", "content": "rain?"}]
    answer = client.responses.create(model="fake-vl", input=history, tools=[TOOL], store=False)
    history += answer.output
    first, second = (item.call_id for item in answer.output if item.type == "function_call")
    parts = [{"type": "input_text", "text": "wet"}]
    history.append({"type": "function_call_output", "call_id": first, "output": "dry"})
    history.append({"type": "function_call_output", "call_id": second, "output": parts})
    worker.reply("It rains.")
    again = client.responses.create(model="fake-vl", input=history, tools=[TOOL], store=False)
    assert again.output_text == "It rains."
    said = prompt(worker)
    assert "[user]rain?[assistant]Let me look.<tool_call>" in said and said.count("<tool_call>") == 2
    assert said.count("[assistant]") == 2 and "</tool_call>[tool]dry[tool]wet[assistant]" in said


@pytest.mark.parametrize("by_reference", [False, True])
def test_two_turns_by_what_is_held(client: openai.OpenAI, worker: FakeWorker, by_reference: bool) -> None:
    worker.reply(IN_PARTS)
    first = client.responses.create(model="fake-vl", input="rain?", tools=[TOOL])
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "wet"}
        for item in first.output
        if item.type == "function_call"
    ]
    worker.reply("It rains.")
    if by_reference:
        named: list[Any] = [{"type": "item_reference", "id": item.id} for item in first.output]
        again: list[Any] = [{"role": "user", "content": "rain?"}, *named, *results]
        second = client.responses.create(model="fake-vl", input=again, tools=[TOOL])
    else:
        second = client.responses.create(
            model="fake-vl", input=results, tools=[TOOL], previous_response_id=first.id
        )
    assert second.output_text == "It rains."
    said = prompt(worker)
    assert "[user]rain?[assistant]Let me look.<tool_call>" in said
    assert said.count("Oslo") == 2 and said.count("[tool]wet") == 2 and said.count("[assistant]") == 2
    third = client.responses.create(model="fake-vl", input="sure?", previous_response_id=second.id)
    assert third.output_text == "It rains." and "[tool]wet[assistant]It rains.[user]sure?" in prompt(worker)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_tool_can_be_forced(client: openai.OpenAI, worker: FakeWorker, choice: Any) -> None:
    worker.reply('{"name": "weather", "arguments": {"city": "Oslo"}}')
    answer = client.responses.create(
        model="fake-vl", input="rain?", tools=[TOOL], tool_choice=choice, parallel_tool_calls=False
    )
    (call,) = answer.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Oslo"}
    assert worker.submits[-1].grammar is not None and answer.parallel_tool_calls is False
    told = answer.tool_choice
    assert (told if isinstance(told, str) else told.model_dump(exclude_unset=True)) == choice


def test_none_of_the_tools_may_be_called(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply(f"{THOUGHT}Perhaps.")
    answer = client.responses.create(model="fake-vl", input="rain?", tools=[TOOL], tool_choice="none")
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert "weather" not in prompt(worker) and answer.tool_choice == "none"


def test_one_call_alone(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply(IN_PARTS)
    answer = client.responses.create(model="fake-vl", input="rain?", tools=[TOOL], parallel_tool_calls=False)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize(("effort", "is_off"), [("none", True), ("minimal", True), ("low", False)])
def test_the_effort_reaches_the_template(
    client: openai.OpenAI, worker: FakeWorker, effort: Any, is_off: bool
) -> None:
    worker.reply("Perhaps.")
    answer = client.responses.create(model="fake-vl", input="rain?", reasoning={"effort": effort})
    assert answer.output_text == "Perhaps." and answer.reasoning is not None
    assert ("<think></think>" in prompt(worker)) == is_off and answer.reasoning.effort == effort


def test_thinking_that_was_cut_off(client: openai.OpenAI, worker: FakeWorker) -> None:
    worker.reply(f"{THOUGHT}Perhaps.")
    answer = client.responses.create(model="fake-vl", input="rain?", max_output_tokens=9)
    thought, message = answer.output
    assert (thought.type, message.type) == ("reasoning", "message")
    assert answer.status == "incomplete" and answer.output_text == ""
    worker.reply("Go on.")
    client.responses.create(model="fake-vl", input="and?", previous_response_id=answer.id)
    assert "[user]rain?" in prompt(worker) and "[user]and?" in prompt(worker)


def test_a_constrained_answer_calls_no_tools(client: openai.OpenAI, worker: FakeWorker) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(
            model="fake-vl", input="x", tools=[TOOL], extra_body={"guided_regex": "[a-z]+"}
        )
    assert caught.value.param == "tools" and not worker.submits


# ---------------------------------------------------------------- by the official types, strictly

OF_STREAM = pydantic.TypeAdapter[Any](ResponseStreamEvent)
OF_SOCKET = pydantic.TypeAdapter[Any](ResponsesServerEvent)
NAMED: dict[str, Any] = {"tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False}
OURS = {"degas", "stream_id", "store", "bytes"}


def undeclared(value: Any) -> list[str]:
    """Fields that the official types do not declare, ours left out."""
    if isinstance(value, list):
        return [name for item in value for name in undeclared(item)]
    if not isinstance(value, pydantic.BaseModel):
        return []
    found = [name for name in value.model_extra or {} if name not in OURS]
    return found + [name for field in type(value).model_fields for name in undeclared(getattr(value, field))]


@pytest.mark.parametrize(
    ("reply", "fields"),
    [
        (IN_PARTS, {"tools": [TOOL]}),
        (IN_PARTS, {"tools": [{"type": "function", "name": "weather"}], "max_output_tokens": 60}),
        (IN_PARTS, {"tools": [TOOL], "include": ["message.output_text.logprobs"]}),
        ('{"name": "weather", "arguments": {"city": "Oslo"}}', {"tools": [TOOL], **NAMED}),
        (f"{THOUGHT}Perhaps.", {"reasoning": {"effort": "high"}}),
        ("", {}),
    ],
)
def test_every_event_and_object_is_valid(
    gateway: GatewayThread, worker: FakeWorker, reply: str, fields: dict[str, Any]
) -> None:
    worker.reply(reply)
    body = {"input": "rain?", **fields}
    whole = Response.model_validate_json(ask(gateway.url, RESPONSES, body).body, strict=True)
    assert undeclared(whole) == []
    with Opened(gateway.url, RESPONSES, {**body, "stream": True}) as opened:
        lines = [line[6:] for line in opened.response if line.startswith(b"data: ")]
    with connect(gateway.url.replace("http", "ws") + RESPONSES) as socket:
        socket.send(json.dumps({"type": "response.create", **body}))
        messages: list[Any] = []
        while not messages or json.loads(messages[-1])["type"] not in (
            "response.completed",
            "response.incomplete",
        ):
            messages.append(socket.recv(timeout=10))
    for adapter, events in ((OF_STREAM, lines), (OF_SOCKET, messages)):
        for event in events:
            assert undeclared(adapter.validate_json(event, strict=True)) == []
    kinds = [
        [item["type"] for item in json.loads(last)["response"]["output"]]
        for last in (lines[-1], messages[-1])
    ]
    assert kinds == [[item.type for item in whole.output]] * 2
