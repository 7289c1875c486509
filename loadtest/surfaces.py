"""Owns what each interface's stream events and refusals look like on the wire. Bytes in, facts out.

Only the fields that a measurement needs are decoded, with typed decoders, so that reading a token costs the
client a microsecond and not a dictionary.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

PATHS: Final = {
    "query": "/v1/query",
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
}


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
    reasoning_content: str | None = None  # what other servers call a model's thinking: output as well
    reasoning: str | None = None


class _ChatChoice(msgspec.Struct, gc=False):
    delta: _ChatDelta = msgspec.field(default_factory=_ChatDelta)
    text: str | None = None  # of a completion
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
    message: str | None = None
    delta: str | None = None


_decode_error = msgspec.json.Decoder(_ErrorReply).decode
_decode_query = msgspec.json.Decoder(_QueryEvent).decode
_decode_chat = msgspec.json.Decoder(_ChatEvent).decode
_decode_response = msgspec.json.Decoder(_ResponseEvent).decode


class Fact(msgspec.Struct, frozen=True, gc=False):
    """The parts of one stream event that are measured."""

    text: str = ""  # output that it carried
    done: bool = False  # the stream ended well
    error: str | None = None  # the stream ended with this code
    message: str = ""  # what the server said about the error
    tokens: int | None = None  # the server's count of output tokens so far
    lane: str | None = None  # WebSocket only: whose event it is
    is_cut: bool = False  # the answer ended by its length


NOTHING: Final = Fact()
CHAT_END: Final = b"[DONE]"
MAX_SHOWN_BYTES: Final = 300
MAX_CODE_CHARS: Final = 64


def read_query_event(data: bytes) -> Fact:
    """Read one `data:` of a Moondream stream. Raises `msgspec.DecodeError`."""
    event = _decode_query(data)
    if event.error is not None:
        return _failed(event.error)
    if not event.completed:
        return Fact(text=event.chunk) if event.chunk else NOTHING
    return Fact(text=event.chunk or "", done=True, tokens=_tokens_of(event))


def read_chat_event(data: bytes) -> Fact:
    """Read one `data:` of a stream of chat completions or completions. Raises `msgspec.DecodeError`."""
    if data == CHAT_END:
        return Fact(done=True)
    event = _decode_chat(data)
    if event.error is not None:
        return _failed(event.error)
    tokens = event.usage.completion_tokens if event.usage is not None else None
    if not event.choices:
        return Fact(tokens=tokens) if tokens is not None else NOTHING
    choice = event.choices[0]
    delta = choice.delta
    text = delta.content or choice.text or delta.reasoning_content or delta.reasoning or ""
    return Fact(text=text, tokens=tokens, is_cut=choice.finish_reason == "length")


def read_response_event(data: bytes | str) -> Fact:
    """Read one event of the Responses API. Raises `msgspec.DecodeError`."""
    event = _decode_response(data)
    match event.type:
        case "response.output_text.delta":
            return Fact(text=event.delta or "", lane=event.stream_id)
        case "response.completed":
            return Fact(done=True, tokens=_output_tokens(event), lane=event.stream_id)
        case "response.incomplete":
            return _read_incomplete(event)
        case "response.failed":
            body = event.response.error if event.response is not None else None
            if body is None:
                return Fact(error="response_failed", lane=event.stream_id)
            return Fact(error=body.name, message=body.message or "", lane=event.stream_id)
        case "error":
            code = _name(event.error) if event.error is not None else event.code
            message = _message(event.error) if event.error is not None else event.message
            return Fact(error=code or "unknown_error", message=message or "", lane=event.stream_id)
        case _:
            return Fact(lane=event.stream_id)


def read_error_body(data: bytes, status: int) -> str:
    """The error code in a refused request's body, or `http_<status>` when there is none."""
    return read_refusal(data, status)[0]


def read_refusal(data: bytes, status: int) -> tuple[str, str]:
    """Code and text of a refused request's body; `http_<status>` and the body's beginning where it is no error object."""
    try:
        reply = _decode_error(data)
    except msgspec.DecodeError:
        return f"http_{status}", data[:MAX_SHOWN_BYTES].decode(errors="replace").strip()
    return _name(reply.error), _message(reply.error)


def _failed(error: _ErrorBody | str) -> Fact:
    return Fact(error=_name(error), message=_message(error))


def _message(error: _ErrorBody | str) -> str:
    return error if isinstance(error, str) else error.message or ""


def _name(error: _ErrorBody | str) -> str:
    return error[:MAX_CODE_CHARS] if isinstance(error, str) else error.name


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
        return Fact(done=True, tokens=_output_tokens(event), lane=event.stream_id, is_cut=True)
    was_cancelled = event.response is not None and event.response.status == "cancelled"
    return Fact(
        error=reason or ("cancelled" if was_cancelled else "response_incomplete"), lane=event.stream_id
    )
