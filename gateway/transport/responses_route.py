"""Owns `POST /v1/responses`, streamed as server-sent events or answered whole, and what is asked of a response by its id.

Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from aiohttp import web

from gateway.api import response_bodies, responses
from gateway.api.conversations import Conversations
from gateway.api.parameters import Json
from gateway.api.response_stream import ResponseStream, Sink
from gateway.decisions.journals import Journal, Journals
from gateway.generation import Carrier, End, Framing, ServingCore
from gateway.transport.http import TENANT, admit_body, json_response
from gateway.transport.resumption import LAST_EVENT, EventFollower, Resumption
from gateway.transport.sse import EventWriter


class EventStreamSink:
    """Spells events as `event:` and `data:` lines."""

    __slots__ = ("_writer",)

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    def send(self, kind: str, event: bytes) -> None:
        """See `Sink`."""
        self._writer.write(b"event: %b\ndata: %b\n\n" % (kind.encode(), event))

    @property
    def is_closing(self) -> Callable[[], bool]:
        """See `LendingSink`."""
        assert self._writer.bounded is not None
        return self._writer.bounded.is_closing

    @property
    def others_wait(self) -> None:
        """See `LendingSink`: nobody else writes while a body is sent."""
        return None

    def lendable(self) -> tuple[int, Framing, bytes, bytes] | None:
        """See `LendingSink`."""
        bounded = self._writer.bounded
        if bounded is None or not self._writer.is_chunked or (descriptor := bounded.lendable()) < 0:
            return None
        return descriptor, Framing.CHUNK, b"event: response.output_text.delta\ndata: ", b"\n\n"

    def lend(self, carrier: Carrier) -> None:
        """See `LendingSink`."""
        assert self._writer.bounded is not None
        self._writer.bounded.carrier = carrier

    def take_back(self, written_bytes: int) -> None:
        """See `LendingSink`."""
        assert self._writer.bounded is not None
        self._writer.bounded.take_back(written_bytes)

    def give(self, rest: bytes) -> None:
        """See `LendingSink`."""
        assert self._writer.bounded is not None
        self._writer.bounded.write(rest)


class JournalSink:
    """Writes events into a journal, as server-sent events; their numbers there are their sequence numbers."""

    __slots__ = ("_journals", "journal")

    def __init__(self, journals: Journals) -> None:
        self._journals = journals
        self.journal: Journal  # set before the first event

    def send(self, kind: str, event: bytes) -> None:
        """See `Sink`."""
        self._journals.write(self.journal, b"event: %b\ndata: %b\n\n" % (kind.encode(), event))


class NoSink:
    """For an answer in one piece: only the terminal response counts, and the stream keeps it."""

    def send(self, kind: str, event: bytes) -> None:
        """See `Sink`."""


class ResponsesRoute:
    """The POST route and the turns it leaves to be continued."""

    def __init__(self, core: ServingCore, conversations: Conversations, resumption: Resumption) -> None:
        self._core = core
        self._conversations = conversations
        self._resumption = resumption

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Handle one request. Raises `RequestError` while the answer can still be an HTTP status."""
        core = self._core
        if LAST_EVENT in request.headers:  # the same request again, of a client that lost its stream
            return await self._resumption.resume(request)
        is_resumable = self._resumption.is_asked(request)
        body = response_bodies.parse_body(await admit_body(request, core))
        tenant = request[TENANT]
        previous = responses.recall(body, tenant, self._conversations)
        prepared = await responses.prepare(core, body, tenant=tenant, previous=previous)
        if body.degas is not None and body.degas.resumable:
            self._resumption.check_on("degas.resumable")
            is_resumable = True
        if body.stream and is_resumable:
            return await self._start(request, body, prepared)
        done: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        writer = EventWriter(request, core.config, core.metrics) if body.stream else None

        def on_closed(stream: ResponseStream, end: End, output: Sequence[Json]) -> None:
            if body.store is not False:
                self._conversations.remember_answer(
                    tenant, stream.opening.response_id, prepared.turn, end, output
                )
            if not done.done():
                done.set_result(end)
            if writer is not None:
                writer.wake()

        sink: Sink = NoSink() if writer is None else EventStreamSink(writer)
        stream = ResponseStream(prepared.opening, sink, prepared.request.model.tokens, on_closed)
        stream.running = core.submit(prepared.request, stream)
        try:
            if writer is None:
                end = await done
                if end.error is not None:
                    raise end.error
                return json_response(stream.response)
            await writer.first()
            if stream.refusal is not None:
                raise stream.refusal
            stream.open()
            await writer.open()
            await done
            return await writer.finish()
        finally:
            if writer is not None:
                writer.abandon()
            stream.cancel()

    async def _start(
        self, request: web.Request, body: response_bodies.CreateBody, prepared: responses.Prepared
    ) -> web.StreamResponse:
        """Stream a response that its client may come back to."""
        resumption, tenant = self._resumption, request[TENANT]
        sink = JournalSink(resumption.journals)

        def on_closed(stream: ResponseStream, end: End, output: Sequence[Json]) -> None:
            if body.store is not False:
                self._conversations.remember_answer(
                    tenant, stream.opening.response_id, prepared.turn, end, output
                )
            resumption.end(journal)

        stream = ResponseStream(prepared.opening, sink, prepared.request.model.tokens, on_closed)
        journal = sink.journal = resumption.open(prepared.opening.response_id, tenant, stream)
        writer = resumption.writer(request, journal)
        follower = EventFollower(writer, journal.stream_id)
        resumption.journals.attach(journal, follower, is_live=True)
        try:
            stream.running = self._core.submit(prepared.request, stream)
            await writer.first()
            if stream.refusal is not None:
                raise stream.refusal
        except BaseException:
            resumption.journals.forget(journal)
            stream.cancel()
            raise
        stream.open()
        return await resumption.follow(request, journal, follower, writer)

    async def get(self, request: web.Request) -> web.StreamResponse:
        """A resumable response: with `stream=true` its events behind `starting_after`, else as it stands. Raises `RequestError`."""
        response_id = request.match_info["id"]
        if request.query.get("stream", "false").lower() == "true" or LAST_EVENT in request.headers:
            return await self._resumption.resume(request, response_id)
        stream = self._held(request)
        return json_response(stream.snapshot())

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """Stop a resumable response; answers with it. Raises `RequestError`."""
        stream = self._held(request)
        stream.cancel()
        return json_response(stream.snapshot())

    def _held(self, request: web.Request) -> ResponseStream:
        journal = self._resumption.journals.find(request[TENANT], request.match_info["id"])
        assert isinstance(journal.stream, ResponseStream)  # only responses are called resp_…
        return journal.stream
