"""Owns what each interface's requests and stream events look like on the wire. Bytes in, facts out.

Only the fields that a measurement needs are decoded, with typed decoders, so that reading a token costs the
client a microsecond and not a dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from loadtest.pictures import Picture
from loadtest.scenarios import Planned

PATHS: Final = {"query": "/v1/query", "chat": "/v1/chat/completions", "responses": "/v1/responses"}


class _ErrorBody(msgspec.Struct, gc=False):
    code: str | int | None = None
    type: str | None = None
    message: str | None = None

    @property
    def name(self) -> str:
        return str(self.code or self.type or "unknown_error")


class _ErrorReply(msgspec.Struct, gc=False):
    error: _ErrorBody | str


class _QueryEvent(msgspec.Struct, gc=False):
    chunk: str | None = None
    completed: bool = False
    token_index: int | None = None
    metrics: dict[str, Any] | None = None
    error: _ErrorBody | str | None = None


class _ChatDelta(msgspec.Struct, gc=False):
    content: str | None = None


class _ChatChoice(msgspec.Struct, gc=False):
    delta: _ChatDelta = msgspec.field(default_factory=_ChatDelta)
    finish_reason: str | None = None


class _ChatUsage(msgspec.Struct, gc=False):
    completion_tokens: int = 0


class _ChatEvent(msgspec.Struct, gc=False):
    choices: list[_ChatChoice] = []
    usage: _ChatUsage | None = None
    error: _ErrorBody | str | None = None


class _ResponseUsage(msgspec.Struct, gc=False):
    output_tokens: int = 0


class _IncompleteDetails(msgspec.Struct, gc=False):
    reason: str | None = None


class _ResponseBody(msgspec.Struct, gc=False):
    status: str = ""
    usage: _ResponseUsage | None = None
    error: _ErrorBody | None = None
    incomplete_details: _IncompleteDetails | None = None


class _ResponseEvent(msgspec.Struct, gc=False):
    type: str = ""
    stream_id: str | None = None
    response: _ResponseBody | None = None
    error: _ErrorBody | str | None = None
    code: str | None = None


_decode_error = msgspec.json.Decoder(_ErrorReply).decode
_decode_query = msgspec.json.Decoder(_QueryEvent).decode
_decode_chat = msgspec.json.Decoder(_ChatEvent).decode
_decode_response = msgspec.json.Decoder(_ResponseEvent).decode


@dataclass(frozen=True, slots=True)
class Fact:
    """The parts of one stream event that are measured."""

    text: bool = False  # it carried output
    done: bool = False  # the stream ended well
    error: str | None = None  # the stream ended with this code
    tokens: int | None = None  # the server's count of output tokens so far
    lane: str | None = None  # WebSocket only: whose event it is


NOTHING: Final = Fact()
TEXT: Final = Fact(text=True)
CHAT_END: Final = b"[DONE]"


def read_query_event(data: bytes) -> Fact:
    """Read one `data:` of a Moondream stream. Raises `msgspec.DecodeError`."""
    event = _decode_query(data)
    if event.error is not None:
        return Fact(error=_name(event.error))
    if not event.completed:
        return TEXT if event.chunk else NOTHING
    return Fact(text=bool(event.chunk), done=True, tokens=_tokens_of(event))


def read_chat_event(data: bytes) -> Fact:
    """Read one `data:` of a chat completion stream. Raises `msgspec.DecodeError`."""
    if data == CHAT_END:
        return Fact(done=True)
    event = _decode_chat(data)
    if event.error is not None:
        return Fact(error=_name(event.error))
    if event.usage is not None:
        return Fact(tokens=event.usage.completion_tokens)
    if event.choices and event.choices[0].delta.content:
        return TEXT
    return NOTHING


def read_response_event(data: bytes | str) -> Fact:
    """Read one event of the Responses API. Raises `msgspec.DecodeError`."""
    event = _decode_response(data)
    match event.type:
        case "response.output_text.delta":
            return Fact(text=True, lane=event.stream_id)
        case "response.completed":
            return Fact(done=True, tokens=_output_tokens(event), lane=event.stream_id)
        case "response.incomplete":
            return _read_incomplete(event)
        case "response.failed":
            body = event.response.error if event.response is not None else None
            return Fact(error=body.name if body is not None else "response_failed", lane=event.stream_id)
        case "error":
            code = _name(event.error) if event.error is not None else event.code
            return Fact(error=code or "unknown_error", lane=event.stream_id)
        case _:
            return Fact(lane=event.stream_id)


def read_error_body(data: bytes, status: int) -> str:
    """The error code in a refused request's body, or `http_<status>` when there is none."""
    try:
        reply = _decode_error(data)
    except msgspec.DecodeError:
        return f"http_{status}"
    return _name(reply.error)


def build_body(planned: Planned, picture: Picture, model: str | None) -> bytes:
    """The request's body; for `responses` the WebSocket message, its lane named after the request."""
    question = picture.questions[planned.question % len(picture.questions)]
    body: dict[str, Any]
    if planned.surface == "query":
        body = {
            "question": question,
            "image_url": picture.data_url,
            "stream": True,
            "settings": {"max_tokens": planned.max_tokens, "temperature": 0},
        }
    elif planned.surface == "chat":
        content = [
            {"type": "image_url", "image_url": {"url": picture.data_url}},
            {"type": "text", "text": question},
        ]
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_completion_tokens": planned.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    else:
        parts = [
            {"type": "input_image", "image_url": picture.data_url},
            {"type": "input_text", "text": question},
        ]
        body = {
            "type": "response.create",
            "stream_id": lane_of(planned),
            "input": [{"type": "message", "role": "user", "content": parts}],
            "max_output_tokens": planned.max_tokens,
            "temperature": 0,
            "store": False,
        }
    if model is not None:
        body["model"] = model
    return msgspec.json.encode(body)


def lane_of(planned: Planned) -> str:
    """The WebSocket lane of a request: one of its own, since a lane answers one request after another."""
    return f"r{planned.index}"


def _name(error: _ErrorBody | str) -> str:
    return error if isinstance(error, str) else error.name


def _tokens_of(event: _QueryEvent) -> int | None:
    for key in ("output_tokens", "completion_tokens", "num_tokens"):
        value = (event.metrics or {}).get(key)
        if isinstance(value, int):
            return value
    return event.token_index + 1 if event.token_index is not None else None


def _output_tokens(event: _ResponseEvent) -> int | None:
    body = event.response
    return body.usage.output_tokens if body is not None and body.usage is not None else None


def _read_incomplete(event: _ResponseEvent) -> Fact:
    details = event.response.incomplete_details if event.response is not None else None
    reason = details.reason if details is not None else None
    if reason == "max_output_tokens":  # a good end, because this length was asked for
        return Fact(done=True, tokens=_output_tokens(event), lane=event.stream_id)
    was_cancelled = event.response is not None and event.response.status == "cancelled"
    return Fact(
        error=reason or ("cancelled" if was_cancelled else "response_incomplete"), lane=event.stream_id
    )
