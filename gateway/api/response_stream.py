"""Owns the order of one response's events, from its announcement to its one end. No sockets; gateway's loop.

A `ResponseStream` is the core's `Listener` for one response. It turns deltas, objects and the end into the
API's event sequence and hands each event to a `Sink` at once; the sink (a WebSocket lane, a server-sent
event stream) only frames it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, cast

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
    ObjectFound,
    TextDelta,
    error_object,
)
from gateway.api.response_items import CallItem, MessageItem, OutputItem, ThoughtItem
from gateway.api.response_object import Opening, ResponseObject
from gateway.decisions.answer_parts import CallArguments, CallOpened, Part, Said, Thought
from gateway.generation import (
    Carrier,
    Delta,
    End,
    Framing,
    RequestError,
    RunningStream,
    SpatialObject,
    TextForm,
    TokenInfo,
    TokenTexts,
)
from shared.errors import ErrorCode, FinishReason

_encode = msgspec.json.Encoder().encode

_DELTA_HEAD: Final = b'{"type":"response.output_text.delta","sequence_number":'
_DELTA_TAIL: Final = b',"logprobs":[]}'


class Sink(Protocol):
    """Where a response's events go: frames and writes each at once, never awaits."""

    def send(self, kind: str, event: bytes) -> None:
        """Take one event: its type, and all of it as JSON."""


class LendingSink(Sink, Protocol):
    """A sink whose text events may be written past it; see `gateway.generation.LendingListener`."""

    def lendable(self) -> tuple[int, Framing, bytes, bytes] | None:
        """The connection's descriptor, and what stands around an event there; None while nobody else may write."""

    @property
    def is_closing(self) -> Callable[[], bool]:
        """See `TextForm.is_closing`."""

    @property
    def others_wait(self) -> Callable[[], int] | None:
        """See `TextForm.others_wait`."""

    def lend(self, carrier: Carrier) -> None:
        """From now on `carrier` writes the stream's text events."""

    def take_back(self, written_bytes: int) -> None:
        """It wrote so much, and writes no more."""

    def give(self, rest: bytes) -> None:
        """Write the rest of an event as it is."""


class Closed(Protocol):
    """Called with a finished stream and its output's items, after its terminal event is out."""

    def __call__(self, stream: ResponseStream, end: End, output: Sequence[Json]) -> None: ...


class ResponseStream:
    """Owns one response's event order: sequence numbers, the open item, and exactly one terminal event.

    An answer that is read in parts has an item for each: thinking, text, calls. Any other is one message, which opens
    with the response.
    """

    __slots__ = (
        "_delta_middle",
        "_first_s",
        "_infos",
        "_items",
        "_lane",
        "_lends",
        "_logprobs",
        "_num_objects",
        "_object",
        "_on_closed",
        "_open_item",
        "_opened",
        "_reader",
        "_sequence_number",
        "_sink",
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
        self._lends = hasattr(sink, "lendable")
        self._tokens = tokens
        self._on_closed = on_closed
        self._stream_id: str | UnsetType = UNSET if opening.stream_id is None else opening.stream_id
        self._lane: Json = {} if opening.stream_id is None else {"stream_id": opening.stream_id}
        self._reader = None if opening.reading.is_plain else opening.reading.reader()
        self._infos: list[TokenInfo] = []  # of tokens whose text the reader has not given out
        self._items: list[OutputItem] = []
        self._open_item: OutputItem | None = None
        # Of the open message: its texts, its log-probabilities, and what stands in its deltas' events.
        self._text: list[str] = []
        self._logprobs: list[Json] = []
        self._delta_middle = b""
        self._sequence_number = -1
        self._num_objects = 0
        self._opened = False
        self._object = ResponseObject(opening)
        self._first_s = 0.0  # as the object's: every token asks

    # ------------------------------------------------------------ events out

    def _send(self, event: Event) -> None:
        self._sink.send(event.type, _encode(event))

    def _next(self) -> int:
        self._sequence_number += 1
        return self._sequence_number

    def _say(self, kind: type[Event], /, **fields: Any) -> None:
        self._send(kind(self._next(), self._stream_id, **fields))

    def open(self) -> None:
        """Announce the response, and its message where the answer is nothing else. Idempotent."""
        if self._opened:
            return
        self._opened = True
        snapshot = self._object.at("in_progress")
        self._say(Created, response=snapshot)
        self._say(InProgress, response=snapshot)
        if self._reader is None:
            self._open_message()

    def _open_message(self) -> None:
        item = MessageItem(self._say, self.opening.response_id, len(self._items), self._lane)
        self._text, self._logprobs, self._delta_middle = item.texts, item.logprobs, item.delta_middle
        self._begin(item)

    def _begin(self, item: OutputItem) -> None:
        """Open an item, after the one that is open has ended."""
        if self._open_item is not None:
            self._open_item.close("completed")
        self._items.append(item)
        self._open_item = item
        item.open()

    def _emit_text(self, text: str, logprobs: list[Json]) -> None:
        self._text.append(text)
        if not logprobs:  # the hot path: everything around the number and the text is made once
            self._sequence_number = number = self._sequence_number + 1
            event = (_DELTA_HEAD, b"%d" % number, self._delta_middle, _encode(text), _DELTA_TAIL)
            self._sink.send("response.output_text.delta", b"".join(event))
            return
        self._logprobs.extend(logprobs)
        assert isinstance(self._open_item, MessageItem)
        self._say(TextDelta, delta=text, logprobs=logprobs, **self._open_item.place)

    def _emit_part(self, part: Part) -> None:
        """One part of an answer that is read in parts, in an item of its kind."""
        assert self._reader is not None
        item, response_id, index = self._open_item, self.opening.response_id, len(self._items)
        match part:
            case Said(text):
                if not isinstance(item, MessageItem):
                    self._open_message()
                self._emit_text(text, self._taken_logprobs())
            case Thought(text):
                if not isinstance(item, ThoughtItem):
                    self._begin(item := ThoughtItem(self._say, response_id, index))
                item.add(text)
            case CallOpened(number, _):
                self._begin(CallItem(self._say, response_id, index, self._reader.calls[number]))
            case CallArguments(_, text):
                assert isinstance(item, CallItem)
                item.add(text)
        self._infos.clear()  # those of thinking and calls have no field here

    def _taken_logprobs(self) -> list[Json]:
        return [token_logprobs(info, self._tokens) for info in self._infos]

    # ------------------------------------------------------------ the core's listener

    def on_delta(self, delta: Delta) -> None:
        """Send new text. Spatial tasks send their text in `on_object`, so their tokens' text is not sent here."""
        if self.ended or self.opening.task != "text":
            return
        self.open()
        if self._first_s == 0.0:
            self._first_s = self._object.first_s = time.monotonic()
        if self._reader is not None:
            if delta.logprobs:
                self._infos.extend(delta.logprobs)
            for part in self._reader.feed(delta.text):
                self._emit_part(part)
            return
        logprobs = [token_logprobs(info, self._tokens) for info in delta.logprobs] if delta.logprobs else []
        if delta.text or logprobs:
            self._emit_text(delta.text, logprobs)

    def on_text(self, text: str) -> None:
        """See `TextListener`."""
        if self._reader is None and self._first_s and not self.ended and self.opening.task == "text":
            self._emit_text(text, [])
        else:
            self.on_delta(Delta(text, (), 0))

    # ------------------------------------------------------------ see `LendingListener`

    def form(self) -> TextForm | None:
        """A text event is its number and its text between bytes that never change."""
        if not self._lends or self._reader is not None or self.ended or not self._first_s:
            return None
        if self.opening.task != "text" or not self._delta_middle:
            return None
        sink = cast(LendingSink, self._sink)
        connection = sink.lendable()
        if connection is None:
            return None
        descriptor, framing, before, behind = connection
        parts = (before + _DELTA_HEAD, self._delta_middle, _DELTA_TAIL + behind)
        return TextForm(
            descriptor, framing, parts, self._sequence_number, True, sink.is_closing, sink.others_wait
        )

    def lend(self, carrier: Carrier) -> None:
        """See `LendingListener`."""
        cast(LendingSink, self._sink).lend(carrier)

    def take_back(self, number: int, text: str, written_bytes: int) -> None:
        """See `LendingListener`."""
        self._sequence_number = number
        if text:
            self._text.append(text)
        cast(LendingSink, self._sink).take_back(written_bytes)

    def give(self, rest: bytes) -> None:
        """See `LendingListener`."""
        cast(LendingSink, self._sink).give(rest)

    def on_object(self, found: SpatialObject) -> None:
        """One more box or point: the extension event, and its JSON as text so that the deltas spell the answer."""
        if self.ended:
            return
        self.open()
        if self._first_s == 0.0:
            self._first_s = self._object.first_s = time.monotonic()
        shape: Json = found.box() if self.opening.task == "detect" else {"x": found.x, "y": found.y}
        shape = _rounded(shape)
        if found.logprobs:
            shape["logprobs"] = _rounded(found.scores())
        self._send(
            ObjectFound(
                self._next(),
                self._stream_id,
                item_id=self._items[0].id,
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
                self._on_closed(self, end, [])
            return
        self.open()
        if self.opening.task != "text" and end.reason is not FinishReason.ERROR:
            self._emit_text("]}" if self._num_objects else self._json_lead() + "]}", [])
        self.ended = True
        if end.reason is FinishReason.ERROR:
            error = end.error or RequestError(ErrorCode.INTERNAL, "the stream failed")
            self.response = self._object.at("failed", self._items, end, error_object(error))
            self._say(Failed, response=self.response)
        else:
            whole = end.reason is FinishReason.STOP
            status = "completed" if whole else "incomplete"
            self._close_items(status)
            if end.reason is FinishReason.CANCELLED:
                status = "cancelled"
            self.response = self._object.at(status, self._items, end)
            self._say(Completed if whole else Incomplete, response=self.response)
        if self._on_closed is not None:
            self._on_closed(self, end, self.response["output"])

    def cancel(self) -> None:
        """Stop it in the worker; the core answers with `on_end`."""
        if self.running is not None and not self.ended:
            self.running.cancel()

    # ------------------------------------------------------------ shapes

    def _close_items(self, status: str) -> None:
        if self._reader is not None:
            for part in self._reader.close():
                self._emit_part(part)
            if not any(isinstance(item, MessageItem | CallItem) for item in self._items):
                self._open_message()  # an answer without text and calls says so
            elif self._infos and isinstance(self._open_item, MessageItem):
                self._emit_text("", self._taken_logprobs())
        assert self._open_item is not None
        self._open_item.close(status)

    def snapshot(self) -> Json:
        """The response object as it stands."""
        return self.response or self._object.at("in_progress")

    def _json_lead(self) -> str:
        return '{"objects":[' if self.opening.task == "detect" else '{"points":['


def _rounded(values: Json) -> Json:
    return {name: round(value, 4) for name, value in values.items()}
