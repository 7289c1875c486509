"""Owns the events of the Responses API as they look on the wire. Runs on the gateway's loop."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from gateway.api.parameters import Json
from gateway.generation import End, RequestError, Usage
from shared.errors import ErrorCode, FinishReason

TERMINAL: Final = frozenset({"response.completed", "response.failed", "response.incomplete", "error"})

CLIENT_FAULTS: Final = frozenset(
    {
        ErrorCode.INVALID_REQUEST,
        ErrorCode.UNSUPPORTED,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        ErrorCode.INVALID_GRAMMAR,
        ErrorCode.QUARANTINED,
    }
)


class Event(msgspec.Struct, tag_field="type", tag=lambda name: name, omit_defaults=True, gc=False):
    """Parent of every server event. `stream_id` is present when the request named a lane."""

    sequence_number: int
    stream_id: str | UnsetType = UNSET

    @property
    def type(self) -> str:
        """The event's name on the wire."""
        return str(self.__struct_config__.tag)


class _Lifecycle(Event, kw_only=True):
    response: Json


class Created(_Lifecycle, tag="response.created"):
    """The response exists; nothing is generated yet."""


class InProgress(_Lifecycle, tag="response.in_progress"):
    """The request is with a worker."""


class Completed(_Lifecycle, tag="response.completed"):
    """Terminal: the whole response."""


class Incomplete(_Lifecycle, tag="response.incomplete"):
    """Terminal: cut short by a limit, a deadline or a cancel."""


class Failed(_Lifecycle, tag="response.failed"):
    """Terminal: an error after the response was created."""


class ItemAdded(Event, tag="response.output_item.added", kw_only=True):
    """An output item opens: a message, thinking or a call."""

    item: Json
    output_index: int


class ItemDone(Event, tag="response.output_item.done", kw_only=True):
    """An output item is whole."""

    item: Json
    output_index: int


class PartAdded(Event, tag="response.content_part.added", kw_only=True):
    """An item's text part opens."""

    item_id: str
    output_index: int
    content_index: int
    part: Json


class PartDone(Event, tag="response.content_part.done", kw_only=True):
    """An item's text part is whole."""

    item_id: str
    output_index: int
    content_index: int
    part: Json


class TextDelta(Event, tag="response.output_text.delta", kw_only=True):
    """More text."""

    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[Json]


class TextDone(Event, tag="response.output_text.done", kw_only=True):
    """All the text."""

    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[Json]


class ThoughtDelta(Event, tag="response.reasoning_text.delta", kw_only=True):
    """More of the model's thinking."""

    item_id: str
    output_index: int
    content_index: int
    delta: str


class ThoughtDone(Event, tag="response.reasoning_text.done", kw_only=True):
    """All of an item's thinking."""

    item_id: str
    output_index: int
    content_index: int
    text: str


class ArgumentsDelta(Event, tag="response.function_call_arguments.delta", kw_only=True):
    """More of a call's arguments."""

    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, tag="response.function_call_arguments.done", kw_only=True):
    """All of a call's arguments, as JSON text."""

    item_id: str
    output_index: int
    arguments: str


class ObjectFound(Event, tag="degas.object", kw_only=True):
    """Extension: one more box or point of a detect or point request."""

    item_id: str
    response_id: str
    output_index: int
    object_index: int
    object: Json


def item_id(response_id: str, kind: str = "msg", output_index: int = 0) -> str:
    """What an output item is called; `kind` is msg, rs (thinking) or fc (a call)."""
    place = f"_{output_index}" if output_index else ""
    return f"{kind}_{response_id.removeprefix('resp_')}{place}"


def response_id_of(item_id: str) -> str:
    """The response whose output item is called so."""
    return "resp_" + "".join(item_id.split("_")[1:2])


def usage_object(usage: Usage) -> Json:
    """Token counts under the API's names."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def incomplete_details(end: End | None) -> Json | None:
    """Why a response is incomplete, or None when it is not."""
    if end is None or end.reason in (FinishReason.STOP, FinishReason.ERROR, FinishReason.CANCELLED):
        return None
    # The API's own list of reasons knows no deadline; `degas.finish_reason` says it.
    return {"reason": "max_output_tokens"} if end.reason is FinishReason.LENGTH else {}


def error_object(error: RequestError) -> Json:
    """A failed response's error: `code` from the API's own list, our finer code as `type`."""
    if error.code is ErrorCode.QUEUE_FULL:
        code = "rate_limit_exceeded"
    elif error.code in CLIENT_FAULTS:
        code = "invalid_prompt"
    else:
        code = "server_error"
    return {"code": code, "message": error.message, "type": error.code.value, "param": error.param}
