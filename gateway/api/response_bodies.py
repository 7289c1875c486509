"""Owns what a Responses client may send: bodies and WebSocket messages, their fields and bounds.

The same body serves `POST /v1/responses` and `response.create` on the WebSocket. The extension field `degas`
selects Moondream's tasks: `{"task": "detect", "object": "red circle"}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from gateway.api.parameters import (
    MAX_OBJECTS,
    MAX_TOP_LOGPROBS,
    Count,
    Json,
    SamplingFields,
    decode_body,
)
from gateway.generation import RequestError
from shared.errors import ErrorCode

MAX_ITEMS: Final = 4096
MAX_PARTS: Final = 256

_LANE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}", re.ASCII)


class Part(msgspec.Struct):
    """One piece of a message's content."""

    type: str
    text: str | None = None
    image_url: str | None = None
    file_id: str | None = None


class Item(msgspec.Struct):
    """One input item; a message unless `type` says otherwise."""

    type: str = "message"
    role: str = "user"
    content: str | Annotated[list[Part], Meta(max_length=MAX_PARTS)] | None = None
    id: str | None = None


class Format(msgspec.Struct):
    """`text.format`: free text, or JSON to a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: Json | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    """`text`: the shape of the answer."""

    format: Format | None = None


class DegasOptions(msgspec.Struct, forbid_unknown_fields=True):
    """The extension field `degas`: which of the model's tasks, and its argument."""

    task: Literal["query", "caption", "detect", "point"] = "query"
    length: Literal["short", "normal", "long"] = "normal"
    object: Annotated[str, Meta(max_length=512)] = ""
    max_objects: Annotated[int, Meta(ge=1, le=MAX_OBJECTS)] | None = None


class CreateBody(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """The fields of a create request."""

    input: str | Annotated[list[Item], Meta(max_length=MAX_ITEMS)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    generate: bool | None = None
    degas: DegasOptions | None = None
    # accepted: they change nothing about the answer here
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    truncation: str | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Any = None
    max_tool_calls: int | None = None
    reasoning: Any = None
    prompt_cache_options: Any = None
    # refused when they ask for something
    tools: Any = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None
    context_management: Any = None
    access_programs: Any = None
    image: Any = None


class ResponseCreate(CreateBody, tag="response.create", kw_only=True, forbid_unknown_fields=True):
    """WebSocket: start a response on a lane."""

    stream_id: str | None = None


class ResponseCancel(msgspec.Struct, tag="response.cancel"):
    """WebSocket: stop one response by its id, or all of a lane's. What has already finished is left alone."""

    response_id: str | None = None
    stream_id: str | None = None


class ResponseSteer(msgspec.Struct, tag="response.steer"):
    """WebSocket: known to the API, refused here."""

    previous_response_id: str | None = None


class Authenticate(msgspec.Struct, tag="degas.authenticate"):
    """WebSocket: the key as first message, for browsers, which cannot set headers."""

    api_key: Annotated[str, Meta(max_length=1024)]


ClientEvent = ResponseCreate | ResponseCancel | ResponseSteer | Authenticate


class Envelope(msgspec.Struct):
    """The part of a malformed message that is needed to answer on the right lane."""

    type: Any = None
    stream_id: Any = None


_decode_body = msgspec.json.Decoder(CreateBody).decode
_decode_event: Callable[[bytes], ClientEvent] = msgspec.json.Decoder(ClientEvent).decode
_decode_envelope = msgspec.json.Decoder(Envelope).decode


def parse_body(data: bytes) -> CreateBody:
    """Decode a POST body. Raises `RequestError` naming the field at fault."""
    return decode_body(_decode_body, data)


def parse_event(data: str) -> ClientEvent:
    """Decode a WebSocket message. Raises `RequestError` naming the field at fault."""
    event = decode_body(_decode_event, data.encode(errors="surrogatepass"))
    stream_id = getattr(event, "stream_id", None)
    if stream_id is not None and not lane_name_ok(stream_id):
        allowed = "1 to 256 ASCII letters, digits, underscores, hyphens or periods"
        raise RequestError(ErrorCode.INVALID_REQUEST, f"stream_id is {allowed}", param="stream_id")
    return event


def lane_of(data: str) -> str | None:
    """The lane that a malformed message names, if it can be read."""
    try:
        stream_id = _decode_envelope(data).stream_id
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return stream_id if isinstance(stream_id, str) and lane_name_ok(stream_id) else None


def lane_name_ok(stream_id: str) -> bool:
    """Whether a lane may be called this."""
    return _LANE_NAME.fullmatch(stream_id) is not None
