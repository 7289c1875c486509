"""Owns one Responses WebSocket connection: its lanes, their order, and what is cancelled when it goes. Gateway loop.

A lane runs one response at a time, first come first served; different lanes run at once. A connection never
awaits a client: events are written by `FrameWriter` from inside the core's callbacks. The only tasks are one
for each response being *prepared* (a picture is decoded off the loop); streaming has none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Final

import msgspec
import structlog

from gateway.api import response_bodies, responses
from gateway.api.conversations import Conversations
from gateway.api.parameters import Json
from gateway.api.response_bodies import Authenticate, ResponseCancel, ResponseCreate, ResponseSteer, Resume
from gateway.api.response_stream import ResponseStream
from gateway.decisions.holdings import Holding
from gateway.errors import error_headers, error_object, http_status
from gateway.faults import fault_fields
from gateway.generation import Carrier, End, Framing, RequestError, ServingCore, Usage
from gateway.transport.frames import FrameWriter
from gateway.transport.resumed_lanes import ResumedResponses
from gateway.transport.resumption import Resumption
from shared.errors import ErrorCode, FinishReason

MAX_ACTIVE_LANES: Final = 16
MAX_PENDING: Final = 64
MAX_PENDING_BYTES: Final = 64 << 20

log = structlog.get_logger(__name__)

_encode = msgspec.json.Encoder().encode


def error_event(error: RequestError, stream_id: str | None = None) -> bytes:
    """The WebSocket's error event: the content, status and headers that an HTTP answer would have."""
    details = error_object(error)
    if error.code is ErrorCode.NOT_FOUND and error.param == "previous_response_id":
        details["code"] = "previous_response_not_found"  # the name clients of this API look for
    event: dict[str, object] = {
        "type": "error",
        "status": http_status(error),
        "error": details,
        "headers": {name.lower(): value for name, value in error_headers(error).items()},
    }
    if stream_id is not None:
        event["stream_id"] = stream_id
    return _encode(event)


class LaneSink:
    """Frames one response's events onto the connection."""

    __slots__ = ("_writer",)

    def __init__(self, writer: FrameWriter) -> None:
        self._writer = writer

    def send(self, kind: str, event: bytes) -> None:
        """See `Sink`."""
        self._writer.write(event)

    def lendable(self) -> tuple[int, Framing, bytes, bytes] | None:
        """See `LendingSink`."""
        descriptor = -1 if self._writer.is_shared else self._writer.bounded.lendable()
        return None if descriptor < 0 else (descriptor, Framing.TEXT_FRAME, b"", b"")

    @property
    def is_closing(self) -> Callable[[], bool]:
        """See `LendingSink`."""
        return self._writer.bounded.is_closing

    @property
    def others_wait(self) -> Callable[[], int]:
        """See `LendingSink`: aiohttp answers pings."""
        return self._writer.bounded.others_wait

    def lend(self, carrier: Carrier) -> None:
        """See `LendingSink`."""
        self._writer.bounded.carrier = carrier

    def take_back(self, written_bytes: int) -> None:
        """See `LendingSink`."""
        self._writer.bounded.take_back(written_bytes)

    def give(self, rest: bytes) -> None:
        """See `LendingSink`."""
        self._writer.bounded.write(rest)


class Pending:
    """A create that waits for its lane, or for one of the connection's active places."""

    __slots__ = ("body", "size_bytes")

    def __init__(self, body: ResponseCreate, size_bytes: int) -> None:
        self.body = body
        self.size_bytes = size_bytes


class Lanes:
    """All responses of one authenticated connection."""

    def __init__(
        self,
        core: ServingCore,
        writer: FrameWriter,
        conversations: Conversations,
        resumption: Resumption,
        *,
        tenant: str,
        waiting: Holding,
        max_active: int = MAX_ACTIVE_LANES,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._core = core
        self._writer = writer
        self._sink = LaneSink(writer)
        self._resumed = ResumedResponses(resumption, writer, tenant)
        self._shared_turns = conversations
        self._own_turns = Conversations(
            max_turns=64, max_bytes=16 << 20
        )  # turns with `store: false` are kept for this connection only
        self._tenant = tenant
        self._max_active = max_active
        self._max_pending = max_pending
        self._preparing: dict[str | None, asyncio.Task[None]] = {}
        self._streams: dict[str | None, ResponseStream] = {}
        self._pending: deque[Pending] = deque()
        self._pending_bytes = 0
        self._waiting = waiting  # the same bytes, beside what the tenant's other connections hold
        self._closed = False
        # A waiting response begins when another ends, inside the core's callback: who asked must not come from there.
        self._context = copy_context()

    @property
    def num_active(self) -> int:
        """Responses being prepared or streamed."""
        return len(self._preparing) + len(self._streams)

    @property
    def is_busy(self) -> bool:
        """Whether the client waits for something."""
        return bool(self.num_active or self._pending or len(self._resumed))

    def on_message(self, data: str) -> None:
        """Act on one client message. A faulty message is answered with an error event; the socket stays open."""
        try:
            event = response_bodies.parse_event(data)
            match event:
                case ResponseCreate():
                    self._on_create(event, len(data))
                case ResponseCancel():
                    self._on_cancel(event)
                case ResponseSteer():
                    raise RequestError(ErrorCode.UNSUPPORTED, "steering is not supported", param="type")
                case Resume():
                    self._resumed.begin(event.response_id, event.starting_after)
                case Authenticate():
                    pass  # already authenticated: a second key changes nothing
        except RequestError as error:
            self._writer.write(error_event(error, response_bodies.lane_of(data)))

    def close(self) -> None:
        """The connection is gone: cancel everything at once."""
        self._closed = True
        self._pending.clear()
        self._waiting.set(0)
        for task in self._preparing.values():
            task.cancel()
        left = self._resumed.leave()
        for stream in list(self._streams.values()):
            if stream not in left:
                stream.cancel()
        self._streams.clear()

    # ------------------------------------------------------------ creating

    def _on_create(self, body: ResponseCreate, size_bytes: int) -> None:
        if self._is_free(body.stream_id):
            self._begin(body)
            return
        total_bytes = self._pending_bytes + size_bytes
        is_full = len(self._pending) >= self._max_pending or total_bytes > MAX_PENDING_BYTES
        if is_full or not self._waiting.may_take(total_bytes):
            raise RequestError(
                ErrorCode.QUEUE_FULL,
                f"{len(self._pending)} responses wait on this connection already; let some finish first",
                param="stream_id",
            )
        self._pending.append(Pending(body, size_bytes))
        self._count(size_bytes)

    def _count(self, more_bytes: int) -> None:
        self._pending_bytes += more_bytes
        self._waiting.set(self._pending_bytes)

    def _is_free(self, lane: str | None) -> bool:
        return (
            lane not in self._preparing and lane not in self._streams and self.num_active < self._max_active
        )

    def _begin(self, body: ResponseCreate) -> None:
        lane = body.stream_id
        task = asyncio.get_running_loop().create_task(
            self._prepare(body), name="prepare-response", context=self._context.copy()
        )
        self._preparing[lane] = task
        task.add_done_callback(lambda task: self._on_prepared(lane, task))

    async def _prepare(self, body: ResponseCreate) -> None:
        try:
            self._core.begin_request()
            previous = responses.recall(body, self._tenant, self._own_turns, self._shared_turns)
            prepared = await responses.prepare(
                self._core, body, tenant=self._tenant, previous=previous, stream_id=body.stream_id
            )
            if not self._closed:
                self._start(body, prepared)
        except RequestError as error:
            self._refuse(body.stream_id, error)
        except Exception as fault:
            log.error("response_preparation_failed", **fault_fields(fault))
            self._refuse(
                body.stream_id, RequestError(ErrorCode.INTERNAL, "the request could not be prepared")
            )

    def _on_prepared(self, lane: str | None, task: asyncio.Task[None]) -> None:
        del self._preparing[lane]
        if task.cancelled() and not self._closed:
            self._refuse(lane, RequestError(ErrorCode.CANCELLED, "cancelled before it began"))
        self._begin_next()

    def _start(self, body: ResponseCreate, prepared: responses.Prepared) -> None:
        turns = self._shared_turns if body.store is not False else self._own_turns
        lane, turn = body.stream_id, prepared.turn
        is_resumable = body.degas is not None and body.degas.resumable
        sink = self._resumed.sink() if is_resumable else None

        def on_closed(stream: ResponseStream, end: End, output: Sequence[Json]) -> None:
            self._streams.pop(lane, None)
            if sink is not None:
                self._resumed.end(sink)
            self._writer.is_shared = len(self._streams) > 1
            if stream.refusal is not None:
                self._refuse(lane, stream.refusal)
            turns.remember_answer(self._tenant, stream.opening.response_id, turn, end, output)
            self._begin_next()

        tokens = prepared.request.model.tokens
        stream = ResponseStream(prepared.opening, sink or self._sink, tokens, on_closed)
        if sink is not None:
            self._resumed.open(sink, stream)
        self._streams[lane] = stream
        self._writer.is_shared = len(self._streams) > 1
        if body.generate is False:
            stream.on_end(End(FinishReason.STOP, Usage()))  # the turn is kept, nothing is generated
            return
        try:
            stream.running = self._core.submit(prepared.request, stream)
        except RequestError:
            del self._streams[lane]
            if sink is not None:
                self._resumed.end(sink, refused=True)
            raise
        stream.open()

    def _refuse(self, lane: str | None, error: RequestError) -> None:
        self._writer.write(error_event(error, lane))

    def _begin_next(self) -> None:
        """Start every waiting create whose lane is free, in order of arrival."""
        if self._closed or not self._pending:
            return
        waiting, self._pending = self._pending, deque()
        passed: set[str | None] = (
            set()
        )  # lanes whose first create could not start: later ones must wait behind it
        for pending in waiting:
            lane = pending.body.stream_id
            if lane not in passed and self._is_free(lane):
                self._count(-pending.size_bytes)
                self._begin(pending.body)
            else:
                passed.add(lane)
                self._pending.append(pending)

    # ------------------------------------------------------------ cancelling

    def _on_cancel(self, event: ResponseCancel) -> None:
        if event.response_id is not None:
            for stream in list(self._streams.values()):
                if stream.opening.response_id == event.response_id:
                    stream.cancel()
            self._resumed.cancel(event.response_id)
            return
        lane = event.stream_id
        dropped = [pending for pending in self._pending if pending.body.stream_id == lane]
        self._pending = deque(pending for pending in self._pending if pending.body.stream_id != lane)
        self._count(-sum(pending.size_bytes for pending in dropped))
        if lane in self._preparing:
            self._preparing[lane].cancel()
        if lane in self._streams:
            self._streams[lane].cancel()
        for _ in dropped:
            self._refuse(lane, RequestError(ErrorCode.CANCELLED, "cancelled before it began"))
