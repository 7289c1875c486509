"""Whatever a client sends, a request is understood or refused with its field's name; nothing else is raised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.response_bodies import CreateBody, ResponseCreate, lane_of, parse_body, parse_event
from gateway.api.response_input import read_input
from gateway.generation import RequestError
from shared.errors import ErrorCode

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fields = st.dictionaries(
    st.sampled_from([*CreateBody.__struct_fields__, "type", "stream_id"]), json_values, max_size=5
)


@given(fields, st.sampled_from(["response.create", "response.cancel", "degas.authenticate", "x"]))
def test_any_json_is_parsed_or_refused(body: dict[str, object], kind: str) -> None:
    text = json.dumps({**body, "type": kind})
    for parse in (parse_event, lambda text: parse_body(text.encode())):
        try:
            parse(text)
        except RequestError as error:
            assert error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.UNSUPPORTED)
            assert len(error.message) < 1000
    lane_of(text)


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse_event(text)
    assert lane_of(text) is None


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=5)), max_size=5))
def test_messages_keep_their_order_and_the_last_user_asks(turns: list[tuple[str, str]]) -> None:
    body = parse_body(
        json.dumps({"input": [{"role": role, "content": text} for role, text in turns]}).encode()
    )
    asked = read_input(body, 1000)
    assert [(message.role, message.text()) for message in asked.messages] == turns
    assert asked.question == next((text for role, text in reversed(turns) if role == "user"), "").strip()


texts = st.none() | st.text(max_size=4)
parts = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["input_text", "reasoning_text", "summary_text", "input_image", "x"])},
        optional={"text": texts, "image_url": texts},
    ),
    max_size=3,
)
items = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "other"]),
        "role": st.sampled_from(["user", "assistant", "tool"]),
        "content": texts | parts,
        "output": texts | parts,
        "summary": st.none() | parts,
        **dict.fromkeys(("id", "call_id", "name", "arguments"), texts),
    },
)


@given(st.lists(items, max_size=4))
def test_any_items_are_read_or_refused_by_their_place(given: list[dict[str, Any]]) -> None:
    body = parse_body(json.dumps({"input": given}).encode())
    try:
        asked = read_input(body, 1000)
    except RequestError as error:
        assert error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.UNSUPPORTED)
        assert error.param is not None and error.param.startswith("input[") and error.param in error.message
    else:
        assert len(asked.places) == len(asked.messages)
        assert all(
            (message.role == "tool") == (message.tool_call_id is not None) for message in asked.messages
        )


THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {"role": "assistant", "content": "I look."}
CALLED = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
GAVE = {"type": "function_call_output", "call_id": "c", "output": "noon"}


def turns(*given: dict[str, Any]) -> list[str]:
    """The messages of these items, in short: role, thinking, text, number of calls."""
    read = read_input(parse_body(json.dumps({"input": given}).encode()), 1000).messages
    return [
        ":".join((m.role, m.reasoning_content or "", m.text(), "c" * len(m.tool_calls or ()))) for m in read
    ]


def test_what_the_assistant_does_before_an_answer_of_others_is_one_turn() -> None:
    assert turns(THOUGHT, SAID, CALLED, CALLED, GAVE, GAVE) == [
        "assistant:hm:I look.:cc",
        *["tool::noon:"] * 2,
    ]
    assert turns(THOUGHT, CALLED, SAID, CALLED) == ["assistant:hm:I look.:cc"]
    assert turns(CALLED, THOUGHT, CALLED, GAVE, THOUGHT, SAID) == [
        "assistant:hm::cc", "tool::noon:", "assistant:hm:I look.:",
    ]  # fmt: skip
    assert turns(SAID, SAID, THOUGHT, SAID, SAID) == [
        "assistant::I look.:", "assistant::I look.:", "assistant:hm:I look.:", "assistant::I look.:",
    ]  # fmt: skip


def test_thinking_that_only_another_server_can_read_leaves_no_turn() -> None:
    assert turns({"type": "reasoning", "summary": [], "encrypted_content": "x"}, SAID) == [
        "assistant::I look.:"
    ]
    summary = [{"type": "summary_text", "text": "short"}]
    assert turns({"type": "reasoning", "summary": summary}, SAID) == ["assistant:short:I look.:"]


def test_texts_over_the_limit_are_too_large() -> None:
    body = parse_body(json.dumps({"input": "x" * 60, "instructions": "y" * 60}).encode())
    with pytest.raises(RequestError) as caught:
        read_input(body, 100)
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


@pytest.mark.parametrize("name", ["a", "card-1", "A_b.c-9", "x" * 256])
def test_lane_names(name: str) -> None:
    event = parse_event(json.dumps({"type": "response.create", "input": "x", "stream_id": name}))
    assert isinstance(event, ResponseCreate) and event.stream_id == name


@pytest.mark.parametrize("name", ["", "a b", "é", "x" * 257, "a\n", 5, None])
def test_bad_lane_names_are_refused_and_not_echoed(name: object) -> None:
    text = json.dumps({"type": "response.create", "input": "x", "stream_id": name})
    if name is None:
        parse_event(text)
    else:
        with pytest.raises(RequestError):
            parse_event(text)
    assert lane_of(text) is None
