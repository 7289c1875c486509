"""Owns `POST /v1/responses`: streamed as server-sent events, or answered whole. Runs on the gateway's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web

from gateway.api import response_bodies, responses
from gateway.api.conversations import Conversations
from gateway.api.parameters import Json
from gateway.api.response_stream import ResponseStream, Sink
from gateway.generation import End, ServingCore
from gateway.transport.http import TENANT, admit_body, json_response
from gateway.transport.sse import EventWriter


class EventStreamSink:
    """Spells events as `event:` and `data:` lines."""

    __slots__ = ("_writer",)

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    def send(self, kind: str, event: bytes) -> None:
        """See `Sink`."""
        self._writer.write(b"event: %b\ndata: %b\n\n" % (kind.encode(), event))


class NoSink:
    """For an answer in one piece: only the terminal response counts, and the stream keeps it."""

    def send(self, kind: str, event: bytes) -> None:
        """See `Sink`."""


class ResponsesRoute:
    """The POST route and the turns it leaves to be continued."""

    def __init__(self, core: ServingCore, conversations: Conversations) -> None:
        self._core = core
        self._conversations = conversations

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Handle one request. Raises `RequestError` while the answer can still be an HTTP status."""
        core = self._core
        body = response_bodies.parse_body(await admit_body(request, core))
        tenant = request[TENANT]
        previous = responses.recall(body, tenant, self._conversations)
        prepared = await responses.prepare(core, body, tenant=tenant, previous=previous)
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
