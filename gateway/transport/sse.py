"""Owns server-sent events over HTTP: headers, chunk framing, and one write per event. Gateway's loop.

Events are written to the aiohttp transport from inside the core's callbacks, past aiohttp's own writer: no
queue, no task, no await per token. The handler's coroutine only waits for the end. Headers are held back
until the first event (or a moment), so that a refusal by the worker is still a proper HTTP status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec
from aiohttp import HttpVersion11, web

from gateway.api.answers import EventShape
from gateway.config import GatewayConfig
from gateway.generation import (
    Carrier,
    Delta,
    End,
    Framing,
    GenerateRequest,
    HttpCounts,
    Listener,
    RequestError,
    RunningStream,
    SpatialObject,
    TextForm,
)
from gateway.transport.bounded import BoundedWriter
from gateway.transport.door import Door
from gateway.transport.life import LifeSign

_COMMIT_S: Final = 0.5  # after so long without an event the headers are sent alone
_SIZES: Final = [b"%x\r\n" % size for size in range(1024)]
"""What stands before a chunk of so many bytes."""
_ENDS: Final[dict[bytes, bytes]] = {}
"""What stands behind texts, of the few shapes there are: one object for all streams, which stays in the cache."""

_encode = msgspec.json.encode

HEADERS: Final = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventWriter:
    """One response's body. Events written before `open` wait for it."""

    def __init__(
        self,
        request: web.Request,
        config: GatewayConfig,
        metrics: HttpCounts,
        *,
        media_type: str = EventShape.media_type,
        waiting: bytes = EventShape.waiting,
    ) -> None:
        self._request = request
        self._waiting = waiting
        self._config = config
        self._metrics = metrics
        self._held: list[bytes] = []
        self.bounded: BoundedWriter | None = None  # once the headers are out
        self._life: LifeSign | None = None
        self._is_chunked = request.version >= HttpVersion11
        self._response = web.StreamResponse(headers={"Content-Type": media_type, **HEADERS})
        self._something = asyncio.get_running_loop().create_future()

    def write(self, events: bytes) -> None:
        """Send one or more whole events. Never waits, never raises."""
        if not events:
            return  # an empty chunk would end the body; later events would then corrupt the connection's next answer
        if self.bounded is None:
            self._held.append(events)
            self.wake()
        else:
            self.bounded.write(self._frame(events))

    def wake(self) -> None:
        """Let `first` return although nothing was written."""
        if not self._something.done():
            self._something.set_result(None)

    async def first(self) -> None:
        """Wait for the first event, or a moment."""
        await asyncio.wait([self._something], timeout=_COMMIT_S)

    @property
    def has_events(self) -> bool:
        """Whether anything was written yet."""
        return bool(self._held) or self.bounded is not None

    async def open(self, opening: bytes = b"") -> None:
        """Send the headers, `opening` and what was held. Raises ConnectionError when the client is gone."""
        response = self._response
        if not self._is_chunked:
            response.force_close()
        else:
            response.enable_chunked_encoding()
        writer = await response.prepare(self._request)
        transport = self._request.transport
        if writer is None or transport is None or transport.is_closing():
            raise ConnectionResetError("the client left")
        writer.send_headers()
        self.bounded = BoundedWriter(
            transport,
            self._on_stalled,
            limit_bytes=self._config.write_buffer_bytes,
            stall_s=self._config.slow_client_s,
        )
        held, self._held = b"".join((opening, *self._held)), []
        if held:
            self.bounded.write(self._frame(held))
        self._life = LifeSign(self.bounded, self._frame(self._waiting), self._config.life_sign_s)
        self._tell_door(self._life.say)

    async def finish(self) -> web.StreamResponse:
        """End the body properly, after an error as well, so that the connection can serve the next request.

        Closing the connection instead would reset a client that sends its next request at that moment.
        """
        assert self.bounded is not None
        self.abandon()
        await self._response.write_eof()
        return self._response

    def abandon(self) -> None:
        """Write nothing more."""
        if self.bounded is not None:
            self.bounded.close()
        if self._life is not None:
            self._life.close()
            self._life = None
            self._tell_door(None)

    def _tell_door(self, say: Callable[[], None] | None) -> None:
        """What the connection may write to find out whether a client that stopped sending still listens."""
        door = self._request.protocol
        if isinstance(door, Door):
            door.say = say

    @property
    def is_chunked(self) -> bool:
        """Whether what is written needs a chunk's framing."""
        return self._is_chunked

    def _frame(self, events: bytes) -> bytes:
        if not self._is_chunked:
            return events
        return b"%x\r\n%b\r\n" % (len(events), events)

    def _on_stalled(self) -> None:
        # The abort ends the connection, which cancels the handler, which cancels the streams.
        self._metrics.num_slow_clients += 1


class Shape(Protocol):
    """How one API spells a stream of `n` choices as events, each whole: `data: …` and a blank line, or a line of JSON."""

    media_type: str
    waiting: bytes  # said when there is nothing else to say for long

    def opening(self) -> bytes:
        """Before anything else; may be empty."""

    def delta(self, index: int, delta: Delta) -> bytes:
        """New text of one choice."""

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        """What stands before and behind a delta's text in JSON; None where a delta is more than that."""

    def found(self, index: int, found: SpatialObject) -> bytes:
        """One more object of one choice."""

    def end(self, index: int, end: End) -> bytes:
        """One choice is over, without an error."""

    def closing(self, ends: Sequence[End]) -> bytes:
        """All choices are over, without an error."""

    def failure(self, error: RequestError) -> bytes:
        """The stream ends with an error."""


class _Choice:
    """The listener of one choice."""

    __slots__ = ("_done", "_index", "_shape", "_writer", "end")

    def __init__(self, index: int, shape: Shape, writer: EventWriter, done: Callable[[End], None]) -> None:
        self._index = index
        self._shape = shape
        self._writer = writer
        self._done = done
        self.end: End | None = None

    def on_delta(self, delta: Delta) -> None:
        self._writer.write(self._shape.delta(self._index, delta))

    def on_object(self, found: SpatialObject) -> None:
        self._writer.write(self._shape.found(self._index, found))

    def on_end(self, end: End) -> None:
        self.end = end
        if end.error is None:
            self._writer.write(self._shape.end(self._index, end))
        self._done(end)


class _TextChoice(_Choice):
    """One whose deltas are a text between bytes that never change. `is_alone`: nobody else writes to its connection."""

    __slots__ = ("_around_bytes", "_before", "_behind", "_bounded", "_is_alone")

    def __init__(
        self,
        index: int,
        shape: Shape,
        writer: EventWriter,
        done: Callable[[End], None],
        around: tuple[bytes, bytes],
        *,
        is_alone: bool,
    ) -> None:
        super().__init__(index, shape, writer, done)
        self._bounded: BoundedWriter | None = None
        self._is_alone = is_alone
        self._before, behind = around
        self._around_bytes = len(self._before) + len(behind)
        self._behind = _ENDS.setdefault(behind, behind + b"\r\n")

    def on_text(self, text: str) -> None:
        """See `TextListener`: one event, framed as a chunk, in one join."""
        bounded = self._bounded
        said = _encode(text)
        size = self._around_bytes + len(said)
        if bounded is None or size >= len(_SIZES):
            self._writer.write(b"".join((self._before, said, self._behind[:-2])))
            self._bounded = self._writer.bounded
            return
        chunk = b"".join((_SIZES[size], self._before, said, self._behind))
        if self._is_alone:
            bounded.write(chunk)
        else:
            bounded.write_soon(chunk)

    # ------------------------------------------------------------ see `LendingListener`

    def form(self) -> TextForm | None:
        """Its events are a text between bytes that never change."""
        bounded = self._bounded
        if bounded is None or not self._is_alone:
            return None
        descriptor = bounded.lendable()
        if descriptor < 0:
            return None
        parts = (self._before, b"", self._behind[:-2])
        return TextForm(descriptor, Framing.CHUNK, parts, None, False, bounded.is_closing)

    def lend(self, carrier: Carrier) -> None:
        assert self._bounded is not None
        self._bounded.carrier = carrier

    def take_back(self, number: int, text: str, written_bytes: int) -> None:
        assert self._bounded is not None
        self._bounded.take_back(written_bytes)

    def give(self, rest: bytes) -> None:
        assert self._bounded is not None
        self._bounded.write(rest)


def _listeners(num: int, shape: Shape, writer: EventWriter, done: Callable[[End], None]) -> list[_Choice]:
    arounds = [shape.around(index) if writer.is_chunked else None for index in range(num)]
    return [
        _Choice(index, shape, writer, done)
        if around is None
        else _TextChoice(index, shape, writer, done, around, is_alone=num == 1)
        for index, around in enumerate(arounds)
    ]


async def respond(
    request: web.Request,
    config: GatewayConfig,
    metrics: HttpCounts,
    submit: Callable[[GenerateRequest, Listener], RunningStream],
    asked: Sequence[GenerateRequest],
    shape: Shape,
) -> web.StreamResponse:
    """Submit all choices and stream them. Raises `RequestError` while the answer can still be an HTTP status."""
    writer = EventWriter(request, config, metrics, media_type=shape.media_type, waiting=shape.waiting)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    choices: list[_Choice] = []

    def on_done(end: End) -> None:
        if not done.done() and (end.error is not None or all(choice.end is not None for choice in choices)):
            done.set_result(None)
        if end.error is not None:
            writer.wake()

    running: list[RunningStream] = []
    try:
        choices.extend(_listeners(len(asked), shape, writer, on_done))
        for one, choice in zip(asked, choices, strict=True):
            running.append(submit(one, choice))
        await writer.first()
        failed = next((c.end.error for c in choices if c.end is not None and c.end.error is not None), None)
        if failed is not None and not writer.has_events:
            raise failed
        await writer.open(shape.opening())
        await done
        ends = [choice.end for choice in choices if choice.end is not None]
        failed = next((end.error for end in ends if end.error is not None), None)
        if failed is None:
            writer.write(shape.closing(ends))
        else:
            writer.write(shape.failure(failed))
        return await writer.finish()
    finally:
        writer.abandon()
        for stream in running:
            stream.cancel()
