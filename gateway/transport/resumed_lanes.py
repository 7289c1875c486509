"""Owns the resumable responses of one WebSocket: those begun on it, and those it came back for. Gateway's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from gateway.api.response_stream import ResponseStream
from gateway.decisions.journals import Journal
from gateway.generation import RequestError
from gateway.transport.frames import FrameWriter
from gateway.transport.responses_route import JournalSink
from gateway.transport.resumption import AFTER, Resumption
from shared.errors import ErrorCode

MAX_CAME_BACK: Final = 16
_DATA: Final = b"\ndata: "


class MessageFollower:
    """Writes a response's events to one WebSocket, as they were when it was not resumed."""

    def __init__(self, writer: FrameWriter, on_over: Callable[[], None]) -> None:
        self._writer = writer
        self._on_over = on_over
        self._is_followed = True

    def take(self, number: int, event: bytes) -> None:
        """See `Follower`."""
        if self._is_followed:
            self._writer.write(event[event.index(_DATA) + len(_DATA) : -2])

    def over(self) -> None:
        """See `Follower`."""
        self._on_over()

    def replaced(self) -> None:
        """See `Follower`. The connection has other responses and stays; this one is silent on it from now on."""
        self._is_followed = False
        self._on_over()


class ResumedResponses:
    """See the module's docstring. Those begun on this connection are in its lanes as well, which count them."""

    def __init__(self, resumption: Resumption, writer: FrameWriter, tenant: str) -> None:
        self._resumption = resumption
        self._writer = writer
        self._tenant = tenant
        self._followed: dict[str, tuple[Journal, MessageFollower]] = {}
        self._came_back: dict[str, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        """Responses that this connection came back for. They take none of its lanes."""
        return len(self._came_back)

    def sink(self) -> JournalSink:
        """Where a response that begins writes. Raises `RequestError` where none is resumable."""
        self._resumption.check_on("degas.resumable")
        return JournalSink(self._resumption.journals)

    def open(self, sink: JournalSink, stream: ResponseStream) -> None:
        """A response begins on this connection."""
        response_id = stream.opening.response_id
        sink.journal = self._resumption.open(response_id, self._tenant, stream)
        self._attach(sink.journal, is_live=True)

    def end(self, sink: JournalSink, *, refused: bool = False) -> None:
        """It has ended. One that was refused leaves nothing to come back to."""
        self._resumption.end(sink.journal)
        if refused or not len(sink.journal.events):
            self._followed.pop(sink.journal.stream_id, None)
            self._resumption.journals.forget(sink.journal)

    def begin(self, response_id: str, after: int) -> None:
        """Go on with a response behind event `after`. Raises `RequestError`."""
        journal = self._resumption.journals.find(self._tenant, response_id)
        if not isinstance(journal.stream, ResponseStream):
            message = "this stream is no response; GET /v1/streams/{id} goes on with it"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param="response_id")
        journal.check(after, AFTER)
        if response_id in self._followed:
            message = "this connection follows the response already"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="response_id")
        if len(self._came_back) >= MAX_CAME_BACK:
            message = f"{MAX_CAME_BACK} responses are gone on with on this connection; let some finish first"
            raise RequestError(ErrorCode.QUEUE_FULL, message, param="response_id")
        follower = self._attach(journal, is_live=False)
        self._came_back[response_id] = asyncio.get_running_loop().create_task(
            self._catch_up(journal, follower, after), name="resume-response"
        )

    def cancel(self, response_id: str) -> None:
        """Stop a response that this connection came back for; others are left alone."""
        if response_id in self._came_back:
            self._followed[response_id][0].stream.cancel()

    def leave(self) -> set[ResponseStream]:
        """The connection is gone. Returns the streams that wait for another."""
        for task in self._came_back.values():
            task.cancel()
        left: set[ResponseStream] = set()
        for journal, follower in list(self._followed.values()):
            self._resumption.detach(journal, follower)
            assert isinstance(journal.stream, ResponseStream)
            left.add(journal.stream)
        self._followed.clear()
        self._came_back.clear()
        return left

    def _attach(self, journal: Journal, *, is_live: bool) -> MessageFollower:
        response_id = journal.stream_id

        def on_over() -> None:
            self._came_back.pop(response_id, None)
            if self._followed.pop(response_id, None) is not None:
                self._resumption.detach(journal, follower)

        follower = MessageFollower(self._writer, on_over)
        self._followed[response_id] = journal, follower
        self._resumption.journals.attach(journal, follower, is_live=is_live)
        return follower

    async def _catch_up(self, journal: Journal, follower: MessageFollower, after: int) -> None:
        try:
            await self._resumption.catch_up(journal, follower, after, self._writer.unread_bytes)
        except RequestError:  # it read more slowly than the stream grew: what follows would have a gap
            self._writer.abort()
