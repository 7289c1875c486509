"""A tiny server with the three streaming interfaces and programmable faults. Runs on the test's loop."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web


@dataclass
class FakeServer:
    """`fault(n)` names the fault of the n-th request (from 0), or None."""

    first_s: float = 0.0
    gap_s: float = 0.0
    unready: int = 1  # times that it says it is not ready
    models: list[dict[str, Any]] | None = None  # what /v1/models lists; None: there is no such page
    models_status: int = 200
    takes_pictures: bool = True
    takes_trials: bool = True  # whole answers
    metrics: str = ""
    answer: str = ""  # sent as one piece instead of words
    serial: bool = False  # one request at a time, as a saturated server
    fault: Callable[[int], str | None] | None = None
    seen: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    sockets: int = 0
    url: str = ""
    stop: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self._lock = asyncio.Lock()
        self._count = 0

    def _next_fault(self) -> str | None:
        index, self._count = self._count, self._count + 1
        return self.fault(index) if self.fault else None

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.serial:
                async with self._lock:
                    yield
            else:
                yield
        finally:
            self.in_flight -= 1

    async def _pace(self, num_tokens: int) -> AsyncIterator[int]:
        for index in range(num_tokens):
            await asyncio.sleep(self.first_s if index == 0 else self.gap_s)
            yield index

    async def stream_sse(self, request: web.Request) -> web.StreamResponse:
        surface = "query" if request.path == "/v1/query" else "chat"
        body = await request.json()
        self.seen[surface] += 1
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        fault = self._next_fault()
        has_picture = "image_url" in json.dumps(body)
        if (has_picture and not self.takes_pictures) or not (body.get("stream") or self.takes_trials):
            refused = {"message": "no pictures here", "type": "invalid_request_error", "code": "unsupported"}
            return web.json_response({"error": refused}, status=400)
        if not body.get("stream"):
            words = len(json.dumps(body["messages"]).split())
            return web.json_response({"choices": [], "usage": {"prompt_tokens": 2 * words}})
        if fault == "busy":
            error = {"error": {"message": "full", "type": "rate_limit", "param": None, "code": "queue_full"}}
            return web.json_response(error, status=429, headers={"Retry-After": "1"})
        if fault == "stray":
            _transport(request).write(b"0\r\n\r\n")  # what a body ended twice leaves for the next answer
        if fault == "plain500":
            return web.Response(status=500, text="boom")
        limit = (
            body["settings"]["max_tokens"]
            if surface == "query"
            else body.get("max_completion_tokens", body.get("max_tokens"))
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        async with self._turn():
            await response.prepare(request)
            if fault == "hang":
                await asyncio.sleep(30)
            async for index in self._pace(limit):
                if index == 1 and fault in ("midstream", "reset", "truncate", "garbage"):
                    if fault == "midstream":
                        lost = {"message": "its worker was lost", "code": "worker_lost"}
                        await self._send(response, {"error": lost})
                    elif fault == "garbage":
                        await response.write(b"data: {nonsense\n\n")
                    elif fault == "reset":
                        _transport(request).abort()
                    return response
                if surface == "query":
                    chunk = {"chunk": f"w{index} ", "completed": False, "token_index": index}
                else:
                    text = self.answer or f"w{index} "
                    chunk = {"choices": [{"index": 0, "delta": {"content": text}}], "usage": None}
                await self._send(response, chunk)
                if self.answer:
                    break
            if surface == "query":
                await self._send(response, {"chunk": "", "completed": True, "token_index": limit - 1})
            else:
                await self._send(
                    response,
                    {"choices": [{"delta": {}, "finish_reason": "stop" if self.answer else "length"}]},
                )
                await self._send(response, {"choices": [], "usage": {"completion_tokens": limit}})
                await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, event: object) -> None:
        await response.write(b": keep-alive\n\ndata: " + json.dumps(event).encode() + b"\n\n")

    async def responses_ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets += 1
        tasks: set[asyncio.Task[None]] = set()
        async for message in socket:
            if message.type != WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            if event["type"] == "response.create":
                tasks.add(asyncio.create_task(self._respond(request, socket, event)))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return socket

    async def _respond(
        self, request: web.Request, socket: web.WebSocketResponse, event: dict[str, Any]
    ) -> None:
        lane = event["stream_id"]
        self.seen["responses"] += 1
        self.bodies.append(event)
        fault = self._next_fault()

        async def send(kind: str, **values: object) -> None:
            await socket.send_json({"type": kind, "stream_id": lane, "sequence_number": 0, **values})

        if fault == "busy":
            await send("error", code="queue_full", message="full", status=429)
            return
        if fault == "hang":
            return
        async with self._turn():
            await send("response.created", response={"id": "r"})
            async for index in self._pace(event["max_output_tokens"]):
                if index == 1 and fault == "midstream":
                    await send("response.failed", response={"error": {"code": "worker_lost", "message": "x"}})
                    return
                if index == 1 and fault == "reset":
                    _transport(request).abort()
                    return
                await send("response.output_text.delta", delta=f"w{index} ")
            usage = {"output_tokens": event["max_output_tokens"]}
            details = {"reason": "max_output_tokens"}
            await send("response.incomplete", response={"usage": usage, "incomplete_details": details})

    async def list_models(self, request: web.Request) -> web.Response:
        if self.models is None:
            return web.Response(status=404)
        return web.json_response({"object": "list", "data": self.models}, status=self.models_status)

    async def show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics, status=200 if self.metrics else 404)

    async def ready(self, request: web.Request) -> web.Response:
        self.seen["readyz"] += 1
        return web.Response(status=200 if self.seen["readyz"] > self.unready else 503)


def _transport(request: web.Request) -> asyncio.WriteTransport:
    assert isinstance(request.transport, asyncio.WriteTransport)
    return request.transport


@asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[FakeServer]:
    """Serve on a loopback port; `stop` may be called early to play a death."""
    app = web.Application(client_max_size=4 << 20)
    app.router.add_post("/v1/query", server.stream_sse)
    app.router.add_post("/v1/chat/completions", server.stream_sse)
    app.router.add_get("/v1/responses", server.responses_ws)
    app.router.add_get("/readyz", server.ready)
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_get("/metrics", server.show_metrics)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    server.stop = runner.cleanup
    try:
        yield server
    finally:
        await runner.cleanup()
