"""Owns the order of one response's events, from its announcement to its one end. No sockets; gateway's loop.

A `ResponseStream` is the core's `Listener` for one response. It turns deltas, objects and the end into the
API's event sequence and hands each event to a `Sink` at once; the sink (a WebSocket lane, a server-sent
event stream) only frames it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from gateway.api.answers import token_logprobs
from gateway.api.parameters import Json
from gateway.api.response_events import (
    Completed,
    Created,
    Event,
    Failed,
    Incomplete,
    InProgress,
    ItemAdded,
    ItemDone,
    ObjectFound,
    PartAdded,
    PartDone,
    TextDelta,
    TextDone,
    error_object,
    incomplete_details,
    item_id,
    usage_object,
)
from gateway.errors import retry_after_s
from gateway.generation import Delta, End, RequestError, RunningStream, SpatialObject, TokenTexts
from shared.errors import ErrorCode, FinishReason

_encode = msgspec.json.Encoder().encode

_DELTA_HEAD: Final = b'{"type":"response.output_text.delta","sequence_number":'
_DELTA_TAIL: Final = b',"logprobs":[]}'


class Sink(Protocol):
    """Where a response's events go: frames and writes each at once, never awaits."""

    def send(self, kind: str, event: bytes) -> None:
        """Take one event: its type, and all of it as JSON."""


class Closed(Protocol):
    """Called with a finished stream, after its terminal event is out."""

    def __call__(self, stream: ResponseStream, end: End, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Opening:
    """The facts of a response that are fixed before its first token; every lifecycle event repeats `body`."""

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
        tokens: TokenTexts,
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
        self._item_id = item_id(opening.response_id)
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        lane = {} if opening.stream_id is None else {"stream_id": opening.stream_id}
        self._delta_middle = b"," + _encode({**lane, **place})[1:-1] + b',"delta":'
        self._sequence_number = -1
        self._text: list[str] = []
        self._logprobs: list[Json] = []
        self._num_objects = 0
        self._opened = False
        self._created_at = int(time.time())  # the interface's own fields: Unix time, decides nothing
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
        """Send new text. Spatial tasks send their text in `on_object`, so their tokens' text is not sent here."""
        if self.ended or self.opening.task != "text":
            return
        self.open()
        if self._first_s == 0.0:
            self._first_s = time.monotonic()
        logprobs = [token_logprobs(info, self._tokens) for info in delta.logprobs] if delta.logprobs else []
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
            # No event is out yet, so the transport can still answer with an error status.
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
            response["completed_at"] = int(time.time())  # the field is a date, in seconds since 1970
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
