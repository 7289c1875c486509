"""Owns writing WebSocket text frames from inside the core's callbacks, which cannot await. Gateway loop.

aiohttp's `send_str` would wait without a deadline for a client that stopped reading, so whole text frames (RFC 6455)
are built here and written by `BoundedWriter`. Pings, pongs and closes stay aiohttp's.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final

from gateway.transport.bounded import BoundedWriter

_SHORT = struct.Struct("!BB").pack
_MEDIUM = struct.Struct("!BBH").pack
_LONG = struct.Struct("!BBQ").pack
_TEXT_FINAL = 0x81
_HEADS: Final = [
    _SHORT(_TEXT_FINAL, size) if size < 126 else _MEDIUM(_TEXT_FINAL, 126, size) for size in range(1024)
]
"""Of frames of so many bytes: nearly all are short."""

PING: Final = b"\x89\x00"
"""A ping without a payload, as it is sent."""


def text_frame(payload: bytes) -> bytes:
    """One whole text frame around UTF-8 `payload`."""
    length = len(payload)
    if length < len(_HEADS):
        return _HEADS[length] + payload
    if length < 65536:
        return _MEDIUM(_TEXT_FINAL, 126, length) + payload
    return _LONG(_TEXT_FINAL, 127, length) + payload


class FrameWriter:
    """Sends text messages without waiting; a client that does not take them is cut off and `on_stalled` called."""

    __slots__ = ("_is_shared", "bounded")

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        on_stalled: Callable[[], None],
        *,
        limit_bytes: int,
        stall_s: float,
    ) -> None:
        self._is_shared = False
        self.bounded = BoundedWriter(transport, on_stalled, limit_bytes=limit_bytes, stall_s=stall_s)

    @property
    def is_shared(self) -> bool:
        """Whether several streams write: what they say in one turn of the loop then leaves together."""
        return self._is_shared

    @is_shared.setter
    def is_shared(self, is_shared: bool) -> None:
        if is_shared and self.bounded.carrier is not None:
            self.bounded.carrier.come_home()
        self._is_shared = is_shared

    def write(self, payload: bytes) -> None:
        """Send one text message. Once closed it is dropped: the connection's end is already under way."""
        size = len(payload)
        frame = _HEADS[size] + payload if size < len(_HEADS) else text_frame(payload)
        if self._is_shared:
            self.bounded.write_soon(frame)
        else:
            self.bounded.write(frame)

    def unread_bytes(self) -> int:
        """What the client has not taken yet."""
        return self.bounded.unread_bytes

    def abort(self) -> None:
        """Cut the client off at once."""
        self.bounded.abort()

    def close(self) -> None:
        """Write nothing more. Idempotent."""
        self.bounded.close()
