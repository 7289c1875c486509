"""Owns the route `/v1/responses` as a WebSocket: who may connect, how many, and for how long. Gateway's loop.

Origin, key and number of connections are checked before upgrading. A browser cannot set headers, so a browser without
a key may upgrade and send the key as its first message, within a time limit and before any other message.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Final

import structlog
from aiohttp import WSCloseCode, WSMsgType, web

from gateway.access import Access, key_of
from gateway.api import response_bodies
from gateway.api.conversations import Conversations
from gateway.api.response_bodies import Authenticate
from gateway.config import GatewayConfig
from gateway.errors import websocket_close
from gateway.generation import RequestError, ServingCore
from gateway.transport.frames import FrameWriter
from gateway.transport.http import authenticates_itself
from gateway.transport.lanes import Lanes, error_event
from gateway.transport.responses_route import ResponsesRoute
from shared.errors import ErrorCode

PROTOCOLS: Final = ("degas", "realtime", "responses")
KEY_PROTOCOL: Final = "openai-insecure-api-key."
HEARTBEAT_S: Final = 20.0
AUTHENTICATE_WITHIN_S: Final = 10.0
CLOSE_WITHIN_S: Final = 2.0

log = structlog.get_logger(__name__)


class WebSocketRoute:
    """The route's open connections, and the turns they and the POST route share."""

    def __init__(self, core: ServingCore, config: GatewayConfig, conversations: Conversations) -> None:
        self._core = core
        self._config = config
        self._access = Access(config)
        self._conversations = conversations
        self._open: weakref.WeakSet[web.WebSocketResponse] = weakref.WeakSet()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Handle one connection, from handshake to close. Raises `RequestError` before upgrading."""
        if not self._access.origin_allowed(request.headers.get("Origin"), request.host):
            raise RequestError(
                ErrorCode.FORBIDDEN_ORIGIN,
                "this origin may not connect; add it to cors_origins on the server",
            )
        tenant = self._handshake_tenant(request)
        if len(self._open) >= self._config.max_connections:
            raise RequestError(ErrorCode.QUEUE_FULL, f"{len(self._open)} WebSockets are open already")
        ws = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S,
            timeout=CLOSE_WITHIN_S,
            compress=False,
            max_msg_size=self._config.max_body_bytes,
            protocols=PROTOCOLS,
        )
        if not ws.can_prepare(request):
            message = "GET here opens a WebSocket; send POST for plain HTTP"
            raise RequestError(ErrorCode.INVALID_REQUEST, message)
        await ws.prepare(request)
        self._open.add(ws)
        try:
            await self._converse(ws, request, tenant)
        except ConnectionError:
            pass  # the client disconnected during a send
        finally:
            self._open.discard(ws)
        return ws

    async def close_all(self) -> None:
        """Close every connection because the server shuts down; streams that still run end here."""
        closing = [
            ws.close(code=WSCloseCode.SERVICE_RESTART, message=b"shutting down") for ws in list(self._open)
        ]
        await asyncio.gather(*closing, return_exceptions=True)

    # ------------------------------------------------------------ one connection

    def _handshake_tenant(self, request: web.Request) -> str | None:
        """The tenant; None for a browser that may still send its key. Raises `RequestError` UNAUTHORIZED."""
        offered = request.headers.get("Sec-WebSocket-Protocol", "").split(",")
        key = next(
            (
                name.strip().removeprefix(KEY_PROTOCOL)
                for name in offered
                if name.strip().startswith(KEY_PROTOCOL)
            ),
            None,
        )
        if key is None:
            key = key_of(request.headers)
        if key is None and self._access.needs_key and request.headers.get("Origin") is not None:
            return None
        tenant = self._access.tenant(key)
        if tenant is None:
            raise RequestError(
                ErrorCode.UNAUTHORIZED, "an API key is needed" if key is None else "the API key is wrong"
            )
        return tenant

    async def _converse(self, ws: web.WebSocketResponse, request: web.Request, tenant: str | None) -> None:
        transport = request.transport
        if transport is None:
            return
        lanes: Lanes | None = None

        def on_stalled() -> None:
            self._core.metrics.num_slow_clients += 1
            log.info("websocket_client_stalled", code=ErrorCode.SLOW_CLIENT)
            if lanes is not None:
                lanes.close()

        writer = FrameWriter(
            transport,
            on_stalled,
            limit_bytes=self._config.write_buffer_bytes,
            stall_s=self._config.slow_client_s,
        )
        try:
            if tenant is None:
                tenant = await self._first_message_tenant(ws, writer)
                if tenant is None:
                    return
            lanes = Lanes(self._core, writer, self._conversations, tenant=tenant)
            async for message in ws:
                if message.type is WSMsgType.TEXT:
                    lanes.on_message(message.data)
                elif message.type is WSMsgType.BINARY:
                    error = RequestError(ErrorCode.UNSUPPORTED, "messages are JSON text, not binary")
                    writer.write(error_event(error))
        finally:
            writer.close()
            if lanes is not None:
                lanes.close()

    async def _first_message_tenant(self, ws: web.WebSocketResponse, writer: FrameWriter) -> str | None:
        """Wait for the key. None when the connection ended instead, with the reason sent."""
        try:
            async with asyncio.timeout(AUTHENTICATE_WITHIN_S):
                message = await ws.receive()
        except TimeoutError:
            error = RequestError(
                ErrorCode.UNAUTHORIZED, f"no API key came within {AUTHENTICATE_WITHIN_S:.0f} s"
            )
        else:
            if message.type is not WSMsgType.TEXT:
                return None
            error = RequestError(
                ErrorCode.UNAUTHORIZED, "an API key is needed: send degas.authenticate first"
            )
            try:
                event = response_bodies.parse_event(message.data)
            except RequestError:
                event = None
            if isinstance(event, Authenticate):
                tenant = self._access.tenant(event.api_key)
                if tenant is not None:
                    return tenant
                error = RequestError(ErrorCode.UNAUTHORIZED, "the API key is wrong")
        writer.write(error_event(error))
        await ws.close(code=websocket_close(error), message=b"unauthorized")
        return None


def register_websocket(app: web.Application, core: ServingCore, config: GatewayConfig) -> None:
    """Add `/v1/responses`: GET opens the WebSocket, POST is its twin over plain HTTP. They share their turns."""
    conversations = Conversations()
    socket_route = WebSocketRoute(core, config, conversations)
    post_route = ResponsesRoute(core, conversations)

    @authenticates_itself
    async def connect(request: web.Request) -> web.StreamResponse:
        return await socket_route.serve(request)

    async def post(request: web.Request) -> web.StreamResponse:
        return await post_route.serve(request)

    async def close_all(app: web.Application) -> None:
        await socket_route.close_all()

    app.router.add_get("/v1/responses", connect, allow_head=False)
    app.router.add_post("/v1/responses", post)
    app.on_shutdown.append(close_all)
