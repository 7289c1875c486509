"""Responses' tools: what reaches the template, and which field is named where the template does not show it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gateway.api.conversations import Turn
from gateway.api.prompts import FunctionCall, Message, ToolCall
from gateway.api.response_bodies import parse_body
from gateway.api.responses import Prepared, prepare
from gateway.generation import ChatFormat, RequestError
from shared.errors import ErrorCode
from tests.fake_worker import CARD
from tests.unit.gateway.api.fake_core import FakeCore, FakeModel

LLAMA = msgspec.structs.replace(CARD, family="llama", image=None, templates={}, suppress_ids=[])
OWN = ChatFormat(shows_tools=True, dialect="tagged", thinking=("<think>", "</think>"))
NONE = ChatFormat(shows_tools=False, dialect="tagged")
TOOL = {"type": "function", "name": "now", "description": "The time", "parameters": {"type": "object"}}
ASK = {"role": "user", "content": "when?"}
CALLED = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
GAVE = {"type": "function_call_output", "call_id": "c", "output": "noon"}


async def prepared(
    format: ChatFormat | None = OWN, previous: Turn | None = None, **fields: Any
) -> tuple[Prepared, FakeModel]:
    """A prepared request and the model it is for."""
    model = FakeModel(LLAMA, template_names=[] if format is None else ["default"], chat_format=format)
    body = parse_body(json.dumps({"input": [ASK], **fields}).encode())
    return await prepare(FakeCore(model), body, tenant="", previous=previous), model


async def test_tools_and_effort_reach_the_template_as_chats_do() -> None:
    one, model = await prepared(tools=[TOOL], reasoning={"effort": "none"}, instructions="Be brief.")
    ((messages, options),) = model.rendered
    assert [message["role"] for message in messages] == ["system", "user"]
    told = {name: TOOL[name] for name in ("name", "description", "parameters")}
    assert options.tools == [{"type": "function", "function": told}]
    assert options.variables == {"reasoning_effort": "none", "enable_thinking": False}
    assert not one.opening.reading.is_plain
    assert one.opening.body["tools"] == [{**TOOL, "strict": None}]


async def test_a_model_whose_template_shows_no_tools_is_told_in_words() -> None:
    _, model = await prepared(NONE, tools=[TOOL], input=[ASK, CALLED, GAVE])
    ((messages, options),) = model.rendered
    assert not options.tools and '"name":"now"' in messages[0]["content"]
    assert "<tool_call>" in messages[2]["content"] and "noon" in messages[3]["content"]


async def test_results_alone_go_on_with_what_is_held_and_are_kept() -> None:
    call = ToolCall(id="c", type="function", function=FunctionCall(name="now", arguments="{}"))
    held = (Message(role="user", content="when?"), Message(role="assistant", tool_calls=[call]))
    one, model = await prepared(NONE, Turn(held), input=[GAVE], tools=[TOOL])
    ((messages, _),) = model.rendered
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert one.turn.messages == (*held, Message(role="tool", content="noon", tool_call_id="c"))
    with pytest.raises(RequestError) as caught:
        await prepared(NONE, Turn(held), input=[])
    assert caught.value.param == "input"


@pytest.mark.parametrize("fields", [{}, {"instructions": "Be brief."}])
async def test_what_the_template_does_not_show_is_named_by_its_place(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:  # the fake template shows roles and texts only
        await prepared(input=[ASK, CALLED, GAVE], **fields)
    assert (caught.value.code, caught.value.param) == (ErrorCode.UNSUPPORTED, "input[1]")
    assert caught.value.message.startswith("input[1]: ")
    call = ToolCall(id="c", type="function", function=FunctionCall(name="now", arguments="{}"))
    with pytest.raises(RequestError) as caught:
        await prepared(previous=Turn((Message(role="assistant", tool_calls=[call]),)), **fields)
    assert caught.value.param == "previous_response_id"


async def test_an_effort_is_passed_over_where_no_template_could_read_it() -> None:
    model = FakeModel()
    body = parse_body(json.dumps({"input": "hi", "reasoning": {"effort": "high"}}).encode())
    one = await prepare(FakeCore(model), body, tenant="")
    assert one.opening.reading.is_plain and one.opening.body["reasoning"]["effort"] == "high"
