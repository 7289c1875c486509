"""Owns streams that outlive their connection: started on request, followed again by `Last-Event-ID`, given up after a window.

A client asks with the header `X-Degas-Resumable: true`. Its events then carry ids, and go through a journal; all other streams
never come here, so their tokens cost what they did. Gateway's loop.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from aiohttp import web

from gateway.api.answers import EventShape
from gateway.config import GatewayConfig
from gateway.decisions.journals import Follower, Journal, Journals, Writing
from gateway.generation import (
    Delta,
    End,
    GenerateRequest,
    HttpCounts,
    Listener,
    RequestError,
    RunningStream,
    SpatialObject,
)
from gateway.transport.http import STREAM_ID, TENANT, skip_body
from gateway.transport.sse import EventWriter, Shape
from shared.errors import ErrorCode

HEADER: Final = "X-Degas-Resumable"
LAST_EVENT: Final = "Last-Event-ID"
AFTER: Final = "starting_after"

_EVENT_ID: Final = re.compile(r"(?:(?P<stream>[A-Za-z0-9_-]{1,64}):)?(?P<number>-1|[0-9]{1,9})", re.ASCII)
_SLICE_BYTES: Final = 64 << 10
_LOOK_S: Final = 0.01  # how often a client that catches up is looked at

Submit = Callable[[GenerateRequest, Listener], RunningStream]

log = structlog.get_logger(__name__)


class Resumption:
    """All resumable streams of this gateway."""

    def __init__(self, config: GatewayConfig, metrics: HttpCounts) -> None:
        self._config = config
        self._metrics = metrics
        self.journals = Journals(config.resume_window_s, config.resume_bytes, config.resume_total_bytes)
        self._timer: asyncio.TimerHandle | None = None

    def is_asked(self, request: web.Request) -> bool:
        """Whether a request asks to be resumable. Raises `RequestError` where that is turned off."""
        given = request.headers.get(HEADER, "false")
        if given == "false":
            return False
        if given != "true":
            raise RequestError(ErrorCode.INVALID_REQUEST, f"{HEADER}: true or false", param=HEADER)
        self.check_on(HEADER)
        return True

    def check_on(self, param: str) -> None:
        """Raises `RequestError` UNSUPPORTED where no stream can be resumed."""
        if not self._config.resume_window_s:
            message = f"{param}: streams cannot be resumed on this server (resume_window_s is 0)"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)

    # ------------------------------------------------------------ journals

    def open(self, stream_id: str, tenant: str, stream: Writing) -> Journal:
        """A journal for a stream that begins."""
        journal = self.journals.open(stream_id, tenant, stream, time.monotonic())
        if self._timer is None:
            self._tick()
        return journal

    def end(self, journal: Journal) -> None:
        """The stream has ended."""
        self.journals.end(journal, time.monotonic())

    def detach(self, journal: Journal, follower: Follower) -> None:
        """Its connection is gone."""
        self.journals.detach(journal, follower, time.monotonic())

    def close(self) -> None:
        """Stop the timer. The streams end with the service."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        for journal in self.journals.on_time(time.monotonic()):
            log.info("stream_given_up", stream_id=journal.stream_id)
            journal.stream.cancel()
        if len(self.journals):
            wait_s = min(1.0, self.journals.window_s / 4)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._tick)

    # ------------------------------------------------------------ over HTTP

    async def start(
        self, request: web.Request, submit: Submit, asked: Sequence[GenerateRequest], shape: Shape
    ) -> web.StreamResponse:
        """As `sse.respond`, for a stream that its client may come back to."""
        if shape.media_type != EventShape.media_type:
            message = f"{HEADER}: lines of JSON have no ids to come back to; leave it out"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=HEADER)
        stream = _Stream(self, shape, len(asked))
        journal = stream.journal = self.open("st_" + secrets.token_hex(16), request[TENANT], stream)
        writer = self.writer(request, journal, shape.waiting)
        follower = EventFollower(writer, journal.stream_id)
        self.journals.attach(journal, follower, is_live=True)
        try:
            for one, choice in zip(asked, stream.choices, strict=True):
                stream.running.append(submit(one, choice))
            await writer.first()
            if stream.error is not None and not stream.has_begun:
                raise stream.error
        except BaseException:
            self.journals.forget(journal)
            stream.cancel()
            raise
        stream.begin()
        stream.close_if_ended()
        return await self.follow(request, journal, follower, writer)

    def writer(
        self, request: web.Request, journal: Journal, waiting: bytes = EventShape.waiting
    ) -> EventWriter:
        """What writes a journal's events to a client; its answer names the stream."""
        request[STREAM_ID] = journal.stream_id
        return EventWriter(request, self._config, self._metrics, waiting=waiting)

    async def follow(
        self,
        request: web.Request,
        journal: Journal,
        follower: EventFollower,
        writer: EventWriter,
        after: int | None = None,
    ) -> web.StreamResponse:
        """Stream to this client until the end. It has the events up to `after`; None: it is live already."""
        try:
            await writer.open()
            if after is not None:
                await self._catch_up(request, journal, follower, after)
            await follower.done
            return await writer.finish()
        except _Replaced:
            _cut(request)
            raise ConnectionResetError("the stream is followed by another connection") from None
        except RequestError as error:  # of catching up: the headers are out already
            log.info("stream_outran_client", stream_id=journal.stream_id, code=error.code)
            _cut(request)
            raise ConnectionResetError(error.message) from None
        finally:
            writer.abandon()
            self.detach(journal, follower)

    async def _catch_up(
        self, request: web.Request, journal: Journal, follower: EventFollower, after: int
    ) -> None:
        transport = request.transport

        def unread_bytes() -> int:
            return 0 if transport is None or transport.is_closing() else transport.get_write_buffer_size()

        await self.catch_up(journal, follower, after, unread_bytes)

    async def catch_up(
        self, journal: Journal, follower: Follower, after: int, unread_bytes: Callable[[], int]
    ) -> None:
        """Give the follower all events behind `after`, no faster than it reads, then let it go live.

        Raises `RequestError` SLOW_CLIENT for one that the stream outran.
        """
        most = min(_SLICE_BYTES, self._config.write_buffer_bytes // 2)
        number = after + 1
        while journal.follower is follower:
            events = journal.slice(number, most)
            if not events:
                break
            for event in events:
                follower.take(number, event)
                number += 1
            while unread_bytes() > most:  # noqa: ASYNC110 - nobody is told when a transport's buffer empties
                await asyncio.sleep(_LOOK_S)
        self.journals.go_live(journal, follower)

    async def resume(self, request: web.Request, stream_id: str | None = None) -> web.StreamResponse:
        """Go on with a stream where the client says it was. Raises `RequestError` while the answer can be a status."""
        named, after, param = _place(request)
        if stream_id is None:
            stream_id = named
        elif named is not None and named != stream_id:
            raise RequestError(ErrorCode.INVALID_REQUEST, f"{param}: this is of another stream", param=param)
        if stream_id is None:
            message = f"{LAST_EVENT}: it must name its stream, as the ids of resumable streams do"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param=LAST_EVENT)
        await skip_body(request, self._config)
        journal = self.journals.find(request[TENANT], stream_id)
        journal.check(after, param)
        if journal.ended and after + 1 == journal.next:
            return web.Response(status=204)  # it has all: an `EventSource` asks again until it is told so
        writer = self.writer(request, journal)
        follower = EventFollower(writer, journal.stream_id)
        self.journals.attach(journal, follower, is_live=False)
        return await self.follow(request, journal, follower, writer, after)

    def cancel(self, tenant: str, stream_id: str) -> None:
        """Stop a stream for good. Raises `RequestError` NOT_FOUND."""
        self.journals.find(tenant, stream_id).stream.cancel()


class _Replaced(Exception):
    """Another connection follows now."""


class EventFollower:
    """Writes events with their ids to one client."""

    def __init__(self, writer: EventWriter, stream_id: str) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer = writer
        self._stream_id = stream_id.encode()

    def take(self, number: int, event: bytes) -> None:
        """See `Follower`."""
        self._writer.write(b"id: %b:%d\n%b" % (self._stream_id, number, event))

    def over(self) -> None:
        """See `Follower`."""
        if not self.done.done():
            self.done.set_result(None)
        self._writer.wake()

    def replaced(self) -> None:
        """See `Follower`."""
        self._writer.abandon()
        if not self.done.done():
            self.done.set_exception(_Replaced())
            self.done.exception()  # nobody may be waiting for it yet


class _Stream:
    """One stream of `num_choices` choices: writes its events, from its opening to its end, into its journal."""

    def __init__(self, owner: Resumption, shape: Shape, num_choices: int) -> None:
        self.journal: Journal  # set before anything is submitted
        self.running: list[RunningStream] = []
        self.choices = [_Choice(self, index) for index in range(num_choices)]
        self.error: RequestError | None = None
        self.has_begun = False
        self._has_closed = False
        self._owner = owner
        self.shape = shape

    def begin(self) -> None:
        """Write the opening. Idempotent."""
        if not self.has_begun:
            self.has_begun = True
            self._write(self.shape.opening())

    def write(self, events: bytes) -> None:
        """Write whole events, each with its number."""
        self.begin()
        self._write(events)

    def _write(self, events: bytes) -> None:
        for event in events.split(b"\n\n"):
            if event:
                self._owner.journals.write(self.journal, event + b"\n\n")

    def on_end(self, end: End) -> None:
        """One choice is over."""
        if end.error is not None and self.error is None:
            self.error = end.error
        if self.error is not None and not self.has_begun:
            self._owner.end(self.journal)  # wakes the handler, which answers with a status
        else:
            self.close_if_ended()

    def close_if_ended(self) -> None:
        """Write the last events, once all choices are over or one has failed."""
        ends = [choice.end for choice in self.choices if choice.end is not None]
        if self._has_closed or (self.error is None and len(ends) < len(self.choices)):
            return
        self._has_closed = True
        self.write(self.shape.closing(ends) if self.error is None else self.shape.failure(self.error))
        self._owner.end(self.journal)
        self.cancel()

    def cancel(self) -> None:
        """Stop it in the worker."""
        for stream in self.running:
            stream.cancel()


class _Choice:
    """The listener of one choice."""

    __slots__ = ("_index", "_stream", "end")

    def __init__(self, stream: _Stream, index: int) -> None:
        self._stream = stream
        self._index = index
        self.end: End | None = None

    def on_delta(self, delta: Delta) -> None:
        self._stream.write(self._stream.shape.delta(self._index, delta))

    def on_object(self, found: SpatialObject) -> None:
        self._stream.write(self._stream.shape.found(self._index, found))

    def on_end(self, end: End) -> None:
        self.end = end
        if end.error is None:
            self._stream.write(self._stream.shape.end(self._index, end))
        self._stream.on_end(end)


def _place(request: web.Request) -> tuple[str | None, int, str]:
    """The stream that the last event seen names, its number (−1: none was seen), and where that was said."""
    given, param = request.headers.get(LAST_EVENT), LAST_EVENT
    if AFTER in request.query:
        given, param = request.query[AFTER], AFTER
    if given is None:
        return None, -1, param
    match = _EVENT_ID.fullmatch(given.strip())
    if match is None:
        message = f"{param}: an event's number, or the id that it came with"
        raise RequestError(ErrorCode.INVALID_REQUEST, message, param=param)
    return match["stream"], int(match["number"]), param


def _cut(request: web.Request) -> None:
    """End a connection in the middle of its answer: a proper end would look like the stream's."""
    if request.transport is not None:
        request.transport.abort()


def register_streams(app: web.Application, resumption: Resumption) -> None:
    """Add `/v1/streams/{id}`: GET goes on with a stream, DELETE cancels it."""

    async def get(request: web.Request) -> web.StreamResponse:
        return await resumption.resume(request, request.match_info["id"])

    async def delete(request: web.Request) -> web.StreamResponse:
        resumption.cancel(request[TENANT], request.match_info["id"])
        return web.Response(status=204)

    async def stop(app: web.Application) -> None:
        resumption.close()

    app.router.add_get("/v1/streams/{id}", get, allow_head=False)
    app.router.add_delete("/v1/streams/{id}", delete)
    app.on_cleanup.append(stop)
