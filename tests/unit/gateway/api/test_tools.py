"""Tools over chat: what is refused, how a model is told, what a forced answer looks like, how answers are read."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest

from gateway.api import chat
from gateway.api.answers import Collected
from gateway.generation import ChatFormat, Delta, End, RequestError, Usage
from shared.errors import FinishReason
from tests.fake_worker import CARD
from tests.unit.gateway.api.fake_core import FakeCore, FakeModel

LLAMA = msgspec.structs.replace(CARD, family="llama", image=None, templates={}, suppress_ids=[])
OWN = ChatFormat(shows_tools=True, dialect="tagged", thinking=("<think>", "</think>"))
NONE = ChatFormat(shows_tools=False, dialect="tagged")
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "$defs": {"City": {"type": "string"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The sky", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
ASK = [{"role": "user", "content": "rain?"}]
DONE = End(FinishReason.STOP, Usage())


async def prepared(format: ChatFormat | None = OWN, **fields: Any) -> tuple[chat.Chat, FakeModel]:
    """A prepared request and the model it is for."""
    model = FakeModel(LLAMA, template_names=[] if format is None else ["default"], chat_format=format)
    body = {"messages": ASK, "tools": TOOLS, **fields}
    return await chat.prepare(FakeCore(model), json.dumps(body).encode(), request_id="r", tenant=""), model


def whole(one: chat.Chat, text: str) -> Any:
    """The one choice of an answer with this text."""
    choice = Collected(lambda: None)
    choice.on_delta(Delta(text, (), 0))
    choice.on_end(DONE)
    return one.answer([choice])["choices"][0]


def streamed(one: chat.Chat, pieces: list[str]) -> list[Any]:
    """The choices of all chunks of a streamed answer."""
    data = b"".join(one.delta(0, Delta(piece, (), 0)) for piece in pieces) + one.end(0, DONE)
    return [json.loads(line[6:])["choices"][0] for line in data.split(b"\n\n") if line]


async def test_a_template_that_shows_tools_gets_them_as_openai_writes_them() -> None:
    _, model = await prepared()
    ((messages, options),) = model.rendered
    assert [message["role"] for message in messages] == ["user"] and options.tools
    assert options.tools[1] == {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    }


async def test_any_other_model_is_told_in_words_and_history_becomes_text() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    history = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    _, model = await prepared(NONE, messages=history)
    ((messages, options),) = model.rendered
    assert not options.tools
    told, _, called, result = messages
    assert told["content"].startswith("Be brief.") and '"name":"weather"' in told["content"]
    assert called["content"] == '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert (result["role"], result["content"]) == ("user", "<tool_response>\nnoon\n</tool_response>")


async def test_a_call_is_answered_whole_and_streamed_alike() -> None:
    text = 'Sure.\n<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    one, _ = await prepared()
    answer = whole(one, text)
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] == "Sure."
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    chunks = streamed(one, [text[i : i + 5] for i in range(0, len(text), 5)])
    assert chunks[-1]["finish_reason"] == "tool_calls"
    deltas = [chunk["delta"] for chunk in chunks[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Sure."
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"]["name"] == "weather" and calls[0]["id"].startswith("call_")
    assert "".join(piece["function"]["arguments"] for piece in calls) == '{"city": "Oslo"}'
    assert all("id" not in piece for piece in calls[1:])


async def test_thinking_is_apart_from_the_answer() -> None:
    one, _ = await prepared(tools=None)
    answer = whole(one, "<think>\nhm\n</think>\n\nNo.")
    assert (answer["message"]["reasoning_content"], answer["message"]["content"]) == ("hm", "No.")
    deltas = [chunk["delta"] for chunk in streamed(one, ["<thi", "nk>\nhm", "\n</think>\n\nNo."])]
    assert deltas == [{"reasoning_content": "hm"}, {"content": "No."}, {}]


async def test_one_call_alone_where_parallel_calls_are_not_wanted() -> None:
    one, _ = await prepared(parallel_tool_calls=False)
    text = '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "weather"}</tool_call>'
    assert [call["function"]["name"] for call in whole(one, text)["message"]["tool_calls"]] == ["now"]


@pytest.mark.parametrize(
    ("fields", "sound", "wrong"),
    [
        (
            {"tool_choice": "required"},
            [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}],
            [],
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"name": "now", "arguments": {}},
            {"name": "weather", "arguments": {"city": 3}},
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
            {"name": "weather", "arguments": {"city": "Oslo"}},
            {"name": "now", "arguments": {}},
        ),
    ],
)
async def test_a_forced_answer_is_calls_and_is_read_as_such(
    fields: dict[str, Any], sound: Any, wrong: Any
) -> None:
    one, _ = await prepared(**fields)
    grammar = one.requests[0].grammar
    assert grammar is not None
    schema = json.loads(grammar.source)
    schema.pop("x-guidance", None)
    jsonschema.validate(sound, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    answer = whole(one, json.dumps(sound))
    listed = sound if isinstance(sound, list) else [sound]
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == [
        call["name"] for call in listed
    ]
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None


async def test_tools_that_may_not_be_called_are_not_shown() -> None:
    one, model = await prepared(tool_choice="none")
    assert not model.rendered[0][1].tools
    assert "tool_calls" not in whole(one, "<tool_call>{}</tool_call>")["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [TOOLS[1]] * 129}, "tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"guided_choice": ["a"]}, "tools"),
        ({"tool_choice": "required", "guided_choice": ["a"]}, "tools"),
        ({"format": None}, "tools"),
    ],
)
async def test_what_is_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await prepared(**fields)
    assert caught.value.param == param


async def test_a_model_that_is_asked_questions_can_be_forced() -> None:
    """Moondream's kind has no place for tools in its prompt; its answer can still be made a call."""
    body = {"messages": ASK, "tools": TOOLS, "tool_choice": "required"}
    one = await chat.prepare(FakeCore(), json.dumps(body).encode(), request_id="r", tenant="")
    assert one.requests[0].grammar is not None
    assert whole(one, '[{"name": "now", "arguments": {}}]')["finish_reason"] == "tool_calls"
