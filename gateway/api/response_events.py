"""Owns the events of the Responses API and the stream that emits them. Pure: no sockets; runs on the gateway's loop.

A `ResponseStream` is the core's `Listener` for one response. It turns deltas, objects and the end into the
API's event sequence and hands each event to a `Sink` at once; the sink (a WebSocket lane, a server-sent
event stream, or a collector) only frames it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from gateway.api.answers import finite
from gateway.errors import retry_after_s
from gateway.generation import Delta, End, RequestError, RunningStream, SpatialObject, TokenInfo, Usage
from shared.errors import ErrorCode, FinishReason

Json = dict[str, Any]

_encode = msgspec.json.Encoder().encode

_DELTA_HEAD: Final = b'{"type":"response.output_text.delta","sequence_number":'
_DELTA_TAIL: Final = b',"logprobs":[]}'

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
    """The output message opens."""

    item: Json
    output_index: int


class ItemDone(Event, tag="response.output_item.done", kw_only=True):
    """The output message is whole."""

    item: Json
    output_index: int


class PartAdded(Event, tag="response.content_part.added", kw_only=True):
    """The text part opens."""

    item_id: str
    output_index: int
    content_index: int
    part: Json


class PartDone(Event, tag="response.content_part.done", kw_only=True):
    """The text part is whole."""

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


class ObjectFound(Event, tag="degas.object", kw_only=True):
    """Extension: one more box or point of a detect or point request."""

    item_id: str
    response_id: str
    output_index: int
    object_index: int
    object: dict[str, float]


class Sink(Protocol):
    """Where a response's events go: frames and writes each at once, never awaits."""

    def send(self, kind: str, event: bytes) -> None:
        """Take one event: its type, and all of it as JSON."""


class TokenBytes(Protocol):
    """The part of a tokenizer that log-probabilities need."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for."""


class Closed(Protocol):
    """Called with a finished stream, after its terminal event is out."""

    def __call__(self, stream: ResponseStream, end: End, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Opening:
    """What is fixed about a response before its first token; `body` is echoed in every lifecycle event."""

    response_id: str
    model_id: str
    task: str  # text | detect | point
    body: Json
    stream_id: str | None = None


class ResponseStream:
    """Owns one response's event order: sequence numbers, the open item, and exactly one terminal event."""

    __slots__ = (
        "_created_at",
        "_delta_middle",
        "_first_s",
        "_item_id",
        "_logprobs",
        "_num_objects",
        "_on_closed",
        "_opened",
        "_sequence_number",
        "_sink",
        "_started_s",
        "_stream_id",
        "_text",
        "_tokens",
        "ended",
        "opening",
        "refusal",
        "response",
        "running",
    )

    def __init__(
        self,
        opening: Opening,
        sink: Sink,
        tokens: TokenBytes,
        on_closed: Closed | None = None,
    ) -> None:
        self.opening = opening
        self.running: RunningStream | None = None
        self.ended = False
        self.refusal: RequestError | None = None
        self.response: Json | None = None
        self._sink = sink
        self._tokens = tokens
        self._on_closed = on_closed
        self._stream_id: str | UnsetType = UNSET if opening.stream_id is None else opening.stream_id
        self._item_id = "msg_" + opening.response_id.removeprefix("resp_")
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        lane = {} if opening.stream_id is None else {"stream_id": opening.stream_id}
        self._delta_middle = b"," + _encode({**lane, **place})[1:-1] + b',"delta":'
        self._sequence_number = -1
        self._text: list[str] = []
        self._logprobs: list[Json] = []
        self._num_objects = 0
        self._opened = False
        self._created_at = int(time.time())
        self._started_s = time.monotonic()
        self._first_s = 0.0

    # ------------------------------------------------------------ events out

    def _send(self, event: Event) -> None:
        self._sink.send(event.type, _encode(event))

    def _next(self) -> int:
        self._sequence_number += 1
        return self._sequence_number

    def open(self) -> None:
        """Announce the response and its one output message. Idempotent."""
        if self._opened:
            return
        self._opened = True
        snapshot = self.snapshot("in_progress")
        self._send(Created(self._next(), self._stream_id, response=snapshot))
        self._send(InProgress(self._next(), self._stream_id, response=snapshot))
        item = {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._send(ItemAdded(self._next(), self._stream_id, item=item, output_index=0))
        self._send(
            PartAdded(
                self._next(),
                self._stream_id,
                item_id=self._item_id,
                output_index=0,
                content_index=0,
                part=self._part(""),
            )
        )

    def _emit_text(self, text: str, logprobs: list[Json]) -> None:
        self._text.append(text)
        if not logprobs:  # the hot path: everything around the number and the text is made once
            event = b"%b%d%b%b%b" % (
                _DELTA_HEAD,
                self._next(),
                self._delta_middle,
                _encode(text),
                _DELTA_TAIL,
            )
            self._sink.send("response.output_text.delta", event)
            return
        self._send(
            TextDelta(
                self._next(),
                self._stream_id,
                item_id=self._item_id,
                output_index=0,
                content_index=0,
                delta=text,
                logprobs=logprobs,
            )
        )

    # ------------------------------------------------------------ the core's listener

    def on_delta(self, delta: Delta) -> None:
        """New text. Spatial tasks speak through `on_object`, so their token text is not shown."""
        if self.ended or self.opening.task != "text":
            return
        self.open()
        if self._first_s == 0.0:
            self._first_s = time.monotonic()
        logprobs = [self._logprob(info) for info in delta.logprobs] if delta.logprobs else []
        if logprobs:
            self._logprobs.extend(logprobs)
        if delta.text or logprobs:
            self._emit_text(delta.text, logprobs)

    def on_object(self, found: SpatialObject) -> None:
        """One more box or point: the extension event, and its JSON as text so that the deltas spell the answer."""
        if self.ended:
            return
        self.open()
        if self._first_s == 0.0:
            self._first_s = time.monotonic()
        shape = found.box() if self.opening.task == "detect" else {"x": found.x, "y": found.y}
        shape = {name: round(value, 4) for name, value in shape.items()}
        self._send(
            ObjectFound(
                self._next(),
                self._stream_id,
                item_id=self._item_id,
                response_id=self.opening.response_id,
                output_index=0,
                object_index=self._num_objects,
                object=shape,
            )
        )
        lead = "," if self._num_objects else self._json_lead()
        self._num_objects += 1
        self._emit_text(lead + msgspec.json.encode(shape).decode(), [])

    def on_end(self, end: End) -> None:
        """The terminal event, once; nothing follows it."""
        if self.ended:
            return
        if end.reason is FinishReason.ERROR and not self._opened:
            # Nothing was announced, so the transport can still refuse as if it had not begun.
            self.ended = True
            self.refusal = end.error or RequestError(ErrorCode.INTERNAL, "the stream failed")
            if self._on_closed is not None:
                self._on_closed(self, end, "")
            return
        self.open()
        if self.opening.task != "text" and end.reason is not FinishReason.ERROR:
            self._emit_text("]}" if self._num_objects else self._json_lead() + "]}", [])
        self.ended = True
        text = "".join(self._text)
        if end.reason is FinishReason.ERROR:
            error = end.error or RequestError(ErrorCode.INTERNAL, "the stream failed")
            self.response = self.snapshot("failed", text, end, error_object(error))
            self._send(Failed(self._next(), self._stream_id, response=self.response))
        else:
            whole = end.reason is FinishReason.STOP
            status = "completed" if whole else "incomplete"
            self._close_item(text, status)
            if end.reason is FinishReason.CANCELLED:
                status = "cancelled"
            self.response = self.snapshot(status, text, end)
            terminal = Completed if whole else Incomplete
            self._send(terminal(self._next(), self._stream_id, response=self.response))
        if self._on_closed is not None:
            self._on_closed(self, end, text)

    def cancel(self) -> None:
        """Stop it in the worker; the core answers with `on_end`."""
        if self.running is not None and not self.ended:
            self.running.cancel()

    # ------------------------------------------------------------ shapes

    def _close_item(self, text: str, status: str) -> None:
        common: Json = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._send(TextDone(self._next(), self._stream_id, text=text, logprobs=self._logprobs, **common))
        self._send(PartDone(self._next(), self._stream_id, part=self._part(text), **common))
        item = self._item(text, status)
        self._send(ItemDone(self._next(), self._stream_id, item=item, output_index=0))

    def _part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _item(self, text: str, status: str) -> Json:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part(text)],
        }

    def snapshot(
        self, status: str, text: str | None = None, end: End | None = None, error: Json | None = None
    ) -> Json:
        """The response object as it stands: the request's echo, status, output, usage and Degas's timings."""
        item_status = "completed" if status == "completed" else "incomplete"
        response: Json = {
            "id": self.opening.response_id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": error,
            "incomplete_details": incomplete_details(end),
            "model": self.opening.model_id,
            "output": [] if text is None else [self._item(text, item_status)],
            "usage": None if end is None else usage_object(end.usage),
            **self.opening.body,
        }
        if status == "completed":
            response["completed_at"] = int(time.time())
        if end is not None:
            response["degas"] = self._timings(end)
            if end.error is not None:
                response["degas"]["retry_after_s"] = retry_after_s(end.error)
        return response

    def _timings(self, end: End) -> Json:
        usage = end.usage
        now = time.monotonic()
        first_s = usage.time_to_first_token_s or (self._first_s - self._started_s if self._first_s else 0.0)
        streaming_s = now - self._first_s if self._first_s else 0.0
        decode_s = usage.decode_s or streaming_s
        rate = (
            (usage.completion_tokens - 1) / decode_s if decode_s > 0 and usage.completion_tokens > 1 else None
        )
        return {
            "task": self.opening.task,
            "finish_reason": end.reason.value,
            "time_to_first_token_s": round(first_s, 6),
            "total_s": round(now - self._started_s, 6),
            "queue_s": round(usage.queue_s, 6),
            "prefill_s": round(usage.prefill_s, 6),
            "decode_s": round(usage.decode_s, 6),
            "tokens_per_second": None if rate is None else round(rate, 2),
        }

    def _json_lead(self) -> str:
        return '{"objects":[' if self.opening.task == "detect" else '{"points":['

    def _logprob(self, info: TokenInfo) -> Json:
        top = [self._scored(token_id, logprob) for token_id, logprob in info.top]
        return {**self._scored(info.token_id, info.logprob), "top_logprobs": top}

    def _scored(self, token_id: int, logprob: float) -> Json:
        raw = self._tokens.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


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
    if end is None or end.reason in (FinishReason.STOP, FinishReason.ERROR):
        return None
    reason = "max_output_tokens" if end.reason is FinishReason.LENGTH else end.reason.value
    return {"reason": reason}


def error_object(error: RequestError) -> Json:
    """A failed response's error: `code` from the API's own list, our finer code as `type`."""
    if error.code is ErrorCode.QUEUE_FULL:
        code = "rate_limit_exceeded"
    elif error.code in CLIENT_FAULTS:
        code = "invalid_prompt"
    else:
        code = "server_error"
    return {"code": code, "message": error.message, "type": error.code.value, "param": error.param}
