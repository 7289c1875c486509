"""Owns what a Responses client may send: bodies and WebSocket messages, their fields and bounds.

The same body serves `POST /v1/responses` and `response.create` on the WebSocket. The extension field `degas`
selects Moondream's tasks: `{"task": "detect", "object": "red circle"}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from gateway.api.fields import Known
from gateway.api.parameters import (
    MAX_OBJECTS,
    MAX_TOP_LOGPROBS,
    Budget,
    Count,
    Effort,
    Json,
    SamplingFields,
    Verbosity,
    decode_body,
)
from gateway.api.tools import MAX_TOOLS
from gateway.generation import RequestError
from shared.errors import ErrorCode

MAX_ITEMS: Final = 4096
MAX_PARTS: Final = 256

T = TypeVar("T")

_TOOL_TYPE = re.compile(r"tools\[[0-9]+\]\.type")
_LANE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}", re.ASCII)


class Part(Known, kw_only=True):
    """One piece of a message's content."""

    REFUSED = ("file_id", "file_data", "file_url", "filename", "input_audio", "refusal")
    IGNORED = ("annotations", "detail", "logprobs", "prompt_cache_breakpoint")

    type: str
    text: str | None = None
    image_url: str | None = None
    annotations: Any = None
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_data: Any = None
    file_id: Any = None
    file_url: Any = None
    filename: Any = None
    input_audio: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None
    refusal: Any = None


Parts = Annotated[list[Part], Meta(max_length=MAX_PARTS)]


class Item(Known, kw_only=True):
    """One input item; a message unless `type` says otherwise. `response_input` knows which type has which fields."""

    REFUSED = ("caller", "namespace")
    IGNORED = ("encrypted_content", "phase", "status")

    type: str = "message"
    role: str | None = None
    content: str | Parts | None = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Parts | None = None
    summary: Parts | None = None
    caller: Any = None
    encrypted_content: Any = None
    namespace: Any = None
    phase: Any = None
    status: Any = None


class FunctionTool(Known, kw_only=True, tag_field="type", tag="function"):
    """One entry of `tools`: a function that can be called."""

    REFUSED = ("allowed_callers", "defer_loading", "output_schema")

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    allowed_callers: Any = None
    defer_loading: Any = None
    output_schema: Any = None

    def echo(self) -> Json:
        """As a response object repeats it."""
        told = {"description": self.description, "parameters": self.parameters, "strict": self.strict}
        return {"type": "function", "name": self.name, **told}


class Format(Known, kw_only=True):
    """`text.format`: free text, or JSON to a schema."""

    IGNORED = ("name", "description")

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Meta(max_length=256)] | None = None
    description: str | None = None
    schema: Json | None = None
    strict: bool | None = None

    def echo(self) -> Json:
        """As a response object repeats it."""
        if self.type != "json_schema":
            return {"type": self.type}
        told = {"name": self.name or "schema", "description": self.description, "strict": self.strict}
        return {"type": self.type, "schema": self.schema, **told}


class TextOptions(Known, kw_only=True):
    """`text`: the shape of the answer."""

    IGNORED = ("verbosity",)

    format: Format | None = None
    verbosity: Verbosity | None = None


class Reasoning(Known, kw_only=True):
    """`reasoning`: repeated in the response. The effort reaches the model's chat template."""

    IGNORED = ("summary", "generate_summary", "context", "mode")

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: str | None = None


class DegasOptions(Known, kw_only=True):
    """The extension field `degas`: which of the model's tasks, and its argument; whether the stream can be resumed."""

    task: Literal["query", "caption", "detect", "point"] = "query"
    length: Literal["short", "normal", "long"] = "normal"
    object: Annotated[str, Meta(max_length=512)] = ""
    max_objects: Annotated[int, Meta(ge=1, le=MAX_OBJECTS)] | None = None
    logprobs: bool = False
    resumable: bool = False


class CreateBody(SamplingFields, kw_only=True):
    """The fields of a create request."""

    REFUSED = (
        "background",
        "background_options",
        "conversation",
        "prompt",
        "moderation",
        "context_management",
        "access_programs",
        "image",
    )
    IGNORED: ClassVar[tuple[str, ...]] = (
        *SamplingFields.IGNORED,
        "max_tool_calls",  # counts calls of tools that a server runs itself
    )

    input: str | Annotated[list[Item], Meta(max_length=MAX_ITEMS)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    generate: bool | None = None
    degas: DegasOptions | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Any = None
    max_tool_calls: int | None = None
    reasoning: Reasoning | None = None
    thinking_budget: Budget | None = None
    thinking_token_budget: Budget | None = None  # vLLM's name for it
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    background: bool | None = None
    background_options: Any = None
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None
    context_management: Any = None
    access_programs: Any = None
    image: Any = None


class ResponseCreate(CreateBody, tag="response.create", kw_only=True):
    """WebSocket: start a response on a lane."""

    IGNORED = (*CreateBody.IGNORED, "event_id")

    event_id: Any = None
    stream_id: str | None = None


class ResponseCancel(Known, tag="response.cancel", kw_only=True):
    """WebSocket: stop one response by its id, or all of a lane's. What has already finished is left alone."""

    IGNORED = ("event_id",)

    event_id: Any = None
    response_id: str | None = None
    stream_id: str | None = None


class ResponseSteer(Known, tag="response.steer", kw_only=True):
    """WebSocket: known to the API, refused here."""

    event_id: Any = None
    input: Any = None
    response_id: str | None = None
    stream_id: str | None = None
    previous_response_id: str | None = None


class Authenticate(Known, tag="degas.authenticate", kw_only=True):
    """WebSocket: the key as first message, for browsers, which cannot set headers."""

    IGNORED = ("event_id",)

    event_id: Any = None
    api_key: Annotated[str, Meta(max_length=1024)]


class Resume(Known, tag="degas.resume", kw_only=True):
    """WebSocket: go on with a resumable response behind the last event seen; −1: none was."""

    IGNORED = ("event_id",)

    event_id: Any = None
    response_id: Annotated[str, Meta(max_length=64)]
    starting_after: Annotated[int, Meta(ge=-1, le=1 << 30)] = -1


ClientEvent = ResponseCreate | ResponseCancel | ResponseSteer | Authenticate | Resume


class Envelope(msgspec.Struct):
    """The part of a malformed message that is needed to answer on the right lane."""

    type: Any = None
    stream_id: Any = None


_decode_body = msgspec.json.Decoder(CreateBody).decode
_decode_event: Callable[[bytes], ClientEvent] = msgspec.json.Decoder(ClientEvent).decode
_decode_envelope = msgspec.json.Decoder(Envelope).decode


def parse_body(data: bytes) -> CreateBody:
    """Decode a POST body. Raises `RequestError` naming the field at fault."""
    return _checked(_decode_body, data)


def parse_event(data: str) -> ClientEvent:
    """Decode a WebSocket message. Raises `RequestError` naming the field at fault."""
    event = _checked(_decode_event, data.encode(errors="surrogatepass"))
    stream_id = getattr(event, "stream_id", None)
    if stream_id is not None and not lane_name_ok(stream_id):
        allowed = "1 to 256 ASCII letters, digits, underscores, hyphens or periods"
        raise RequestError(ErrorCode.INVALID_REQUEST, f"stream_id is {allowed}", param="stream_id")
    return event


def _checked(decode: Callable[[bytes], T], data: bytes) -> T:
    try:
        return decode_body(decode, data)
    except RequestError as error:
        if error.param is not None and _TOOL_TYPE.fullmatch(error.param):
            message = f'{error.param}: tools are functions here, of type "function"; leave others out'
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=error.param) from None
        raise


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
