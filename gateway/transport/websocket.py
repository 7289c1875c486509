"""Owns the route `/v1/responses` as a WebSocket: who may connect, how many, and for how long. Gateway loop.

The handshake decides what can be decided before upgrading (origin, a wrong key, too many connections). A
browser cannot set headers, so one that brings no key may upgrade and send it as its first message; until then
nothing else is accepted, and not for long.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import structlog
from aiohttp import WSCloseCode, WSMsgType, web

from gateway.api import responses
from gateway.api.conversations import Conversations
from gateway.api.responses import Authenticate
from gateway.errors import error_body, error_headers, http_status, websocket_close
from gateway.generation import Core, RequestError
from gateway.transport.frames import FrameWriter
from gateway.transport.lanes import Lanes, error_event
from shared.errors import ErrorCode

if TYPE_CHECKING:
    from gateway.config import GatewayConfig

PROTOCOLS: Final = ("degas", "realtime", "responses")
KEY_PROTOCOL: Final = "openai-insecure-api-key."
HEARTBEAT_S: Final = 20.0
AUTHENTICATE_WITHIN_S: Final = 10.0
MAX_WEBSOCKETS: Final = 2048

log = structlog.get_logger(__name__)


class WebSocketRoute:
    """The route's connections and the turns they share."""

    def __init__(self, core: Core, config: GatewayConfig, access: Access, conversations: Conversations) -> None:
        self._core = core
        self._config = config
        self._access = access
        self._conversations = conversations
        self._open: weakref.WeakSet[web.WebSocketResponse] = weakref.WeakSet()
        self.num_open = 0
