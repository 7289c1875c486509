"""Owns the route `/v1/responses` as a WebSocket: who may connect, how many, and for how long. Gateway's loop.

Origin, key and number of connections are checked before upgrading. A browser cannot set headers, so a browser without
a key may upgrade and send the key as its first message, within a time limit and before any other message.
"""

from __future__ import annotations

import asyncio
import base64
import weakref
from typing import Final

import structlog
from aiohttp import HttpVersion11, WSCloseCode, WSMessage, WSMsgType, web

from gateway.access import Access, Owner, key_of
from gateway.api import response_bodies
from gateway.api.conversations import Conversations
from gateway.api.response_bodies import Authenticate
from gateway.caller import set_key
from gateway.config import GatewayConfig
from gateway.decisions.holdings import Holdings
from gateway.errors import websocket_close
from gateway.faults import fault_fields
from gateway.generation import RequestError, ServingCore
from gateway.transport.door import OFFERED_KEY, PROTOCOLS
from gateway.transport.frames import PING, FrameWriter
from gateway.transport.guard import FrameGuard
from gateway.transport.http import authenticates_itself
from gateway.transport.lanes import Lanes, error_event
from gateway.transport.life import LifeSign
from gateway.transport.responses_route import ResponsesRoute
from gateway.transport.resumption import Resumption
from shared.errors import ErrorCode

HEARTBEAT_S: Final = 20.0
AUTHENTICATE_WITHIN_S: Final = 10.0
CLOSE_WITHIN_S: Final = 2.0
VERSION: Final = "13"
# A client in the middle of a message sees the close code only if it is read on for a moment.
LINGER_S: Final = 0.2

_OVER: Final = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)

log = structlog.get_logger(__name__)


class Socket(web.WebSocketResponse):
    """aiohttp's, told of faults by the guard, and with the close codes that RFC 6455 (7.4) allows."""

    _guard: FrameGuard | None = None

    def attach(self, request: web.Request) -> FrameGuard:
        """The guard in front of its reader. Raises ConnectionError when the client has left."""
        guard = getattr(request.protocol, "guard", None)
        if guard is None or self._reader is None:
            raise ConnectionResetError("the client left")
        assert isinstance(guard, FrameGuard)
        guard.attach(self._reader.set_exception)
        self._guard = guard
        return guard

    async def answer_close(self, message: WSMessage) -> None:
        """Answer a client's close frame with its own code, or with 1002 where nobody may send such a code."""
        if message.type is WSMsgType.CLOSE:
            code = message.data or WSCloseCode.OK
            await self.close(code=code if _may_be_sent(code) else WSCloseCode.PROTOCOL_ERROR, drain=False)

    def _close_transport(self) -> None:
        if (
            self._guard is None or self._guard.fault is None
        ):  # else the route closes it, after reading on for a moment
            super()._close_transport()


def _may_be_sent(code: int) -> bool:
    return code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999


def _check_handshake(request: web.Request) -> None:
    """Raises `RequestError`, or 426 for another version of the protocol."""
    headers = request.headers
    asks = headers.get("Upgrade", "").strip().lower() == "websocket"
    names = [name.strip().lower() for name in headers.get("Connection", "").split(",")]
    if not asks or "upgrade" not in names:
        message = "GET here opens a WebSocket; send POST for plain HTTP"
        raise RequestError(ErrorCode.INVALID_REQUEST, message)
    if headers.get("Sec-WebSocket-Version", "").strip() != VERSION:
        raise web.HTTPUpgradeRequired(
            reason=f"WebSocket version {VERSION} is spoken here",
            headers={"Sec-WebSocket-Version": VERSION, "Upgrade": "websocket"},
        )
    try:
        key = base64.b64decode(headers.get("Sec-WebSocket-Key", "").strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != 16 or request.version != HttpVersion11 or len(headers.getall("Sec-WebSocket-Key")) > 1:
        message = (
            "the WebSocket handshake is malformed: Sec-WebSocket-Key is 16 bytes in base64, over HTTP/1.1"
        )
        raise RequestError(ErrorCode.INVALID_REQUEST, message)


class WebSocketRoute:
    """The route's open connections, and the turns they and the POST route share."""

    def __init__(
        self,
        core: ServingCore,
        config: GatewayConfig,
        conversations: Conversations,
        holdings: Holdings,
        access: Access,
        resumption: Resumption,
    ) -> None:
        self._core = core
        self._config = config
        self._access = access
        self._resumption = resumption
        self._conversations = conversations
        self._holdings = holdings
        self._open: weakref.WeakSet[Socket] = weakref.WeakSet()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Handle one connection, from handshake to close. Raises `RequestError` before upgrading."""
        if not self._access.origin_allowed(request.headers.get("Origin"), request.host):
            raise RequestError(
                ErrorCode.FORBIDDEN_ORIGIN,
                "this origin may not connect; add it to cors_origins on the server",
            )
        owner = self._handshake_owner(request)
        if len(self._open) >= self._config.max_connections:
            raise RequestError(ErrorCode.QUEUE_FULL, f"{len(self._open)} WebSockets are open already")
        _check_handshake(request)
        ws = Socket(
            heartbeat=HEARTBEAT_S,
            timeout=CLOSE_WITHIN_S,
            autoclose=False,
            compress=False,
            # The guard sets the limit; this one would refuse a message of exactly so many bytes.
            max_msg_size=self._config.max_body_bytes + 1,
            protocols=PROTOCOLS,
        )
        await ws.prepare(request)
        guard = ws.attach(request)
        self._open.add(ws)
        try:
            await self._converse(ws, guard, request, owner)
            if guard.fault is not None:
                await asyncio.sleep(LINGER_S)  # ends as soon as the client leaves
        except ConnectionError:
            pass  # the client disconnected during a send
        except Exception as fault:  # an HTTP answer cannot follow any more
            log.error("websocket_failed", **fault_fields(fault))
            await ws.close(code=WSCloseCode.INTERNAL_ERROR)
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

    def _handshake_owner(self, request: web.Request) -> Owner | None:
        """Whose connection it is; None for a browser that may still send its key. Raises `RequestError` UNAUTHORIZED."""
        key = request.get(OFFERED_KEY)
        if key is None:
            key = key_of(request.headers)
        if key is None and self._access.needs_key and request.headers.get("Origin") is not None:
            return None
        owner = self._access.owner(key)
        if owner is None:
            raise RequestError(
                ErrorCode.UNAUTHORIZED, "an API key is needed" if key is None else "the API key is wrong"
            )
        return owner

    async def _converse(
        self, ws: Socket, guard: FrameGuard, request: web.Request, owner: Owner | None
    ) -> None:
        transport = request.transport
        if transport is None:
            return
        lanes: Lanes | None = None
        life: LifeSign | None = None

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
            if owner is None:
                owner = await self._first_message_owner(ws, guard, writer)
                if owner is None:
                    return
            tenant = owner.tenant
            set_key(owner.key)
            guard.unlock(self._config.max_body_bytes, self._holdings.holding(tenant))
            lanes = opened = Lanes(
                self._core,
                writer,
                self._conversations,
                self._resumption,
                tenant=tenant,
                waiting=self._holdings.holding(tenant),
            )
            life = LifeSign(writer.bounded, PING, self._config.life_sign_s, lambda: opened.is_busy)
            while True:
                message = await ws.receive()
                if message.type in _OVER:
                    break
                if message.type is WSMsgType.TEXT:
                    lanes.on_message(message.data)
                elif message.type is WSMsgType.BINARY:
                    error = RequestError(ErrorCode.UNSUPPORTED, "messages are JSON text, not binary")
                    writer.write(error_event(error))
            await ws.answer_close(message)
        finally:
            writer.close()
            if life is not None:
                life.close()
            if lanes is not None:
                lanes.close()

    async def _first_message_owner(self, ws: Socket, guard: FrameGuard, writer: FrameWriter) -> Owner | None:
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
                await ws.answer_close(message)
                return None
            error = RequestError(
                ErrorCode.UNAUTHORIZED, "an API key is needed: send degas.authenticate first"
            )
            try:
                event = response_bodies.parse_event(message.data)
            except RequestError:
                event = None
            if isinstance(event, Authenticate):
                owner = self._access.owner(event.api_key)
                if owner is not None:
                    return owner
                error = RequestError(ErrorCode.UNAUTHORIZED, "the API key is wrong")
        writer.write(error_event(error))
        guard.dismiss()
        await ws.close(code=websocket_close(error), message=b"unauthorized")
        return None


def register_websocket(
    app: web.Application,
    core: ServingCore,
    config: GatewayConfig,
    holdings: Holdings,
    access: Access,
    resumption: Resumption,
) -> None:
    """Add `/v1/responses`: GET opens the WebSocket, POST is its twin over plain HTTP. They share their turns."""
    conversations = Conversations()
    socket_route = WebSocketRoute(core, config, conversations, holdings, access, resumption)
    post_route = ResponsesRoute(core, conversations, resumption)

    @authenticates_itself
    async def connect(request: web.Request) -> web.StreamResponse:
        return await socket_route.serve(request)

    async def post(request: web.Request) -> web.StreamResponse:
        return await post_route.serve(request)

    async def close_all(app: web.Application) -> None:
        await socket_route.close_all()

    app.router.add_get("/v1/responses", connect, allow_head=False)
    app.router.add_post("/v1/responses", post)
    app.router.add_get("/v1/responses/{id}", post_route.get, allow_head=False)
    app.router.add_post("/v1/responses/{id}/cancel", post_route.cancel)
    app.on_shutdown.append(close_all)
