"""One response's events: any history of deltas, objects and an end gives the API's order and one terminal event."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.api.response_events import TERMINAL
from gateway.api.response_object import Opening
from gateway.api.response_stream import ResponseStream
from gateway.api.spoken import Reading
from gateway.decisions.answer_parts import DIALECTS, ThinkingTags
from gateway.generation import Delta, End, RequestError, SpatialObject, TokenInfo, Usage
from shared.errors import ErrorCode, FinishReason

ECHO = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
IN_PARTS = Reading(DIALECTS["tagged"], ThinkingTags())


class Kept:
    """A sink that keeps what it is sent, as decoded JSON."""

    def __init__(self) -> None:
        self.events: list[dict[str, object]] = []

    def send(self, kind: str, event: bytes) -> None:
        decoded = json.loads(event)
        assert decoded["type"] == kind
        self.events.append(decoded)


class Bytes:
    """A tokenizer of one byte a token."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("latin-1")

    def is_shown(self, token_id: int) -> bool:
        return True


class Cancelled:
    """A running stream that counts its cancels."""

    request_id = "r"

    def __init__(self) -> None:
        self.count = 0

    def cancel(self) -> None:
        self.count += 1


def stream(
    task: str = "text", stream_id: str | None = None, reading: Reading | None = None
) -> tuple[ResponseStream, Kept]:
    """A stream and what it says."""
    kept = Kept()
    opening = Opening("resp_1", "m", task, ECHO, stream_id, reading or Reading())
    return ResponseStream(opening, kept, Bytes()), kept


def end(reason: FinishReason = FinishReason.STOP, error: RequestError | None = None) -> End:
    """An end with a usage."""
    return End(reason, Usage(10, 5, decode_s=0.4), error)


Step = str | FinishReason
steps = st.lists(
    st.one_of(st.text(max_size=5), st.sampled_from(list(FinishReason)), st.just("open!")), max_size=12
)


@given(steps, st.sampled_from([None, "lane-1"]))
def test_any_history_is_ordered_and_ends_once(history: list[Step], stream_id: str | None) -> None:
    one, kept = stream(stream_id=stream_id)
    one.open()
    said, ended = "", False
    for step in history:
        if isinstance(step, FinishReason):
            error = RequestError(ErrorCode.DEVICE_ERROR, "x") if step is FinishReason.ERROR else None
            one.on_end(end(step, error))
            ended = True
        elif step == "open!":
            one.open()
        else:
            one.on_delta(Delta(step, (1,), 0))
            said += "" if ended else step
    kinds = [str(event["type"]) for event in kept.events]
    assert [event["sequence_number"] for event in kept.events] == list(range(len(kinds)))
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert sum(kind in TERMINAL for kind in kinds) == ended
    assert "".join(str(event["delta"]) for event in kept.events if "delta" in event) == said
    if ended:
        assert kinds[-1] in TERMINAL
    assert all(event.get("stream_id") == stream_id for event in kept.events)


def test_a_failure_before_anything_was_said_is_left_to_the_transport() -> None:
    one, kept = stream()
    error = RequestError(ErrorCode.QUEUE_FULL, "full")
    one.on_end(end(FinishReason.ERROR, error))
    assert kept.events == [] and one.refusal is error and one.ended


@pytest.mark.parametrize(
    ("reason", "kind", "status", "why"),
    [
        (FinishReason.STOP, "response.completed", "completed", None),
        (FinishReason.LENGTH, "response.incomplete", "incomplete", {"reason": "max_output_tokens"}),
        (FinishReason.DEADLINE, "response.incomplete", "incomplete", {}),  # no reason of the API's own list
        (FinishReason.CANCELLED, "response.incomplete", "cancelled", None),
    ],
)
def test_each_reason_has_its_own_ending(reason: FinishReason, kind: str, status: str, why: object) -> None:
    one, kept = stream()
    one.on_delta(Delta("hi", (1,), 0))
    one.on_end(end(reason))
    last = kept.events[-1]
    response = last["response"]
    assert isinstance(response, dict)
    assert (last["type"], response["status"]) == (kind, status)
    assert response["incomplete_details"] == why and response["degas"]["finish_reason"] == reason.value
    assert response["degas"]["tokens_per_second"] == 10.0


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (ErrorCode.QUEUE_FULL, "rate_limit_exceeded"),
        (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "invalid_prompt"),
        (ErrorCode.WORKER_LOST, "server_error"),
    ],
)
def test_errors_use_the_apis_own_codes(code: ErrorCode, named: str) -> None:
    one, kept = stream()
    one.open()
    one.on_end(end(FinishReason.ERROR, RequestError(code, "words", retry_after_s=2.0)))
    response = kept.events[-1]["response"]
    assert isinstance(response, dict)
    assert response["error"] == {"code": named, "message": "words", "type": code.value, "param": None}
    assert response["degas"]["retry_after_s"] == 2.0


@given(
    st.sampled_from(["detect", "point"]),
    st.lists(st.builds(SpatialObject, *[st.floats(0, 1) for _ in range(4)]), max_size=6),
)
def test_objects_and_text_say_the_same(task: str, objects: list[SpatialObject]) -> None:
    one, kept = stream(task)
    for found in objects:
        one.on_delta(Delta("never shown", (5,), 0))
        one.on_object(found)
    one.on_end(end())
    text = "".join(str(event["delta"]) for event in kept.events if "delta" in event)
    shown = [event["object"] for event in kept.events if event["type"] == "degas.object"]
    assert json.loads(text) == {"objects" if task == "detect" else "points": shown}
    assert len(shown) == len(objects)


def test_logprobs_follow_their_text() -> None:
    one, kept = stream()
    one.on_delta(Delta("a", (97,), 0, [TokenInfo(97, -0.5, [(97, -0.5), (98, float("-inf"))])]))
    one.on_end(end())
    delta = next(event for event in kept.events if "delta" in event)
    assert delta["logprobs"] == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "b", "logprob": -9999.0, "bytes": [98]},
            ],
        }
    ]
    done = next(event for event in kept.events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == delta["logprobs"]


def test_cancel_reaches_the_worker_until_the_end() -> None:
    one, _ = stream()
    running = Cancelled()
    one.running = running
    one.cancel()
    one.on_end(end())
    one.cancel()
    assert running.count == 1


# ---------------------------------------------------------------- an answer in parts

CALL = '<tool_call>{"name": "now", "arguments": {"zone": "Oslo"}}</tool_call>'
PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "hm", " ", "\n", "Yes.", CALL, CALL[:40], "<tool_call>", "<"]),
    max_size=8,
)
VALIDATE = TypeAdapter[Any](ResponseStreamEvent).validate_python


def cut(text: str, places: list[int]) -> list[str]:
    """The text, cut at these places."""
    at = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


def put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that the events spell, each checked against what went before, and by the official client's types."""
    items: dict[int, dict[str, Any]] = {}
    done: dict[int, dict[str, Any]] = {}
    for number, event in enumerate(events):
        VALIDATE(event)
        assert event["sequence_number"] == number
        index: int = event.get("output_index", -1)
        place: int = event.get("content_index", -1)
        match event["type"]:
            case "response.output_item.added":
                assert index == len(items) == len(done), "one item at a time, in order"
                items[index] = event["item"]
            case "response.content_part.added":
                items[index]["content"].append(event["part"])
                assert place == len(items[index]["content"]) - 1
            case "response.output_text.delta" | "response.reasoning_text.delta":
                items[index]["content"][place]["text"] += event["delta"]
                if "logprobs" in event:
                    items[index]["content"][place]["logprobs"] += event["logprobs"]
            case "response.output_text.done" | "response.reasoning_text.done":
                assert event["text"] == items[index]["content"][place]["text"]
            case "response.content_part.done":
                assert event["part"] == items[index]["content"][place]
            case "response.function_call_arguments.delta":
                items[index]["arguments"] += event["delta"]
            case "response.function_call_arguments.done":
                assert event["arguments"] == items[index]["arguments"]
            case "response.output_item.done":
                done[index] = event["item"]
                assert event["item"] == {**items[index], "status": event["item"]["status"]}
        if "item_id" in event:
            assert event["item_id"] == items[index]["id"]
    assert list(items) == list(done)
    return list(done.values())


@given(PIECES, st.lists(st.integers(0, 400), max_size=12), st.sampled_from(["stop", "length"]))
def test_an_answer_in_parts_is_the_same_however_it_is_cut(
    pieces: list[str], places: list[int], reason: str
) -> None:
    text = "".join(pieces)
    one, kept = stream(reading=IN_PARTS)
    for piece in cut(text, places):
        one.on_delta(Delta(piece, (1,), 0))
    one.on_end(end(FinishReason(reason)))
    output = put_together(kept.events)
    terminal: Any = kept.events[-1]["response"]
    assert terminal["output"] == output
    assert len({item["id"] for item in output}) == len(output)
    spoken = IN_PARTS.reader().whole(text)

    def told(kind: str) -> str:
        return "".join(i["content"][0]["text"] for i in output if i["type"] == kind)

    calls = [(i["name"], i["arguments"]) for i in output if i["type"] == "function_call"]
    assert (told("message"), told("reasoning")) == (spoken.text, spoken.thought)
    assert calls == [(call.name, call.arguments) for call in spoken.calls]
    kinds = [item["type"] for item in output]
    assert kinds.count("message") >= 1 or "function_call" in kinds
    if not spoken.text:
        assert kinds.count("message") == (not calls)


def test_thinking_text_and_calls_are_items_in_their_order() -> None:
    one, kept = stream(stream_id="lane", reading=IN_PARTS)
    for piece in cut(f"<think>\nhm\n</think>\n\nI look.\n{CALL}\n{CALL}", list(range(0, 400, 7))):
        one.on_delta(Delta(piece, (1,), 0))
    one.on_end(end())
    output = put_together(kept.events)
    assert [(item["type"], item["id"], item["status"]) for item in output] == [
        ("reasoning", "rs_1", "completed"),
        ("message", "msg_1_1", "completed"),
        ("function_call", "fc_1_2", "completed"),
        ("function_call", "fc_1_3", "completed"),
    ]
    assert [json.loads(item["arguments"]) for item in output[2:]] == [{"zone": "Oslo"}] * 2
    assert len({item["call_id"] for item in output[2:]}) == 2
    assert all(event["stream_id"] == "lane" for event in kept.events)


def test_a_call_that_was_cut_off_is_incomplete() -> None:
    one, kept = stream(reading=IN_PARTS)
    one.on_delta(Delta(CALL[:50], (1,), 0))
    one.on_end(end(FinishReason.LENGTH))
    (call,) = put_together(kept.events)
    assert (call["type"], call["status"]) == ("function_call", "incomplete")


def test_a_failure_in_an_answer_in_parts_shows_what_there_was() -> None:
    one, kept = stream(reading=IN_PARTS)
    one.on_delta(Delta("<think>hm</think>Yes", (1,), 0))
    one.on_end(end(FinishReason.ERROR, RequestError(ErrorCode.DEVICE_ERROR, "x")))
    response: Any = kept.events[-1]["response"]
    assert [(i["type"], i["status"]) for i in response["output"]] == [
        ("reasoning", "completed"), ("message", "incomplete"),
    ]  # fmt: skip


def test_log_probabilities_go_with_text_and_not_with_thinking() -> None:
    one, kept = stream(reading=IN_PARTS)
    for text in ("<think>", "h", "</think>", "a", "b"):
        one.on_delta(Delta(text, (97,), 0, [TokenInfo(97, -0.5, [])]))
    one.on_end(end())
    _, message = put_together(kept.events)
    (part,) = message["content"]
    assert part["text"] == "ab" and 2 <= len(part["logprobs"]) <= 3
