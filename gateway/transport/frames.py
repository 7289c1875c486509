"""Owns writing WebSocket frames straight to the transport, and the bound on a client that does not read. Gateway loop.

aiohttp's `send_str` is a coroutine that waits, without a deadline, for a client that stopped reading. A token
must be written from inside the core's callback, which cannot await, so frames are built here (unmasked, whole,
uncompressed text frames: six lines of RFC 6455) and written with the transport's own `write`. Pings, pongs and
closes stay aiohttp's; both sides write whole frames from one loop, so they cannot interleave.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final

WRITE_BUFFER_BYTES: Final = 256 << 10
STALL_LIMIT_S: Final = 10.0
PROGRESS_CHECKS: Final = 4  # looks at a stalled client per stall limit

_SHORT = struct.Struct("!BB").pack
_MEDIUM = struct.Struct("!BBH").pack
_LONG = struct.Struct("!BBQ").pack
_TEXT_FINAL = 0x81


def text_frame(payload: bytes) -> bytes:
    """One whole text frame around UTF-8 `payload`."""
    length = len(payload)
    if length < 126:
        return _SHORT(_TEXT_FINAL, length) + payload
    if length < 65536:
        return _MEDIUM(_TEXT_FINAL, 126, length) + payload
    return _LONG(_TEXT_FINAL, 127, length) + payload


class FrameWriter:
    """Writes frames without waiting; aborts the connection when the client stops taking them.

    `on_stalled` is called once, after the abort, with the reason in words.
    """

    __slots__ = (
        "_check",
        "_drained_bytes",
        "_loop",
        "_on_stalled",
        "_progress_s",
        "_stall_limit_s",
        "_transport",
        "_written_bytes",
        "closed",
    )

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        on_stalled: Callable[[str], None],
        *,
        stall_limit_s: float = STALL_LIMIT_S,
    ) -> None:
        self.closed = False
        self._transport = transport
        self._on_stalled = on_stalled
        self._loop = asyncio.get_running_loop()
        self._stall_limit_s = stall_limit_s
        self._written_bytes = 0
        self._drained_bytes = 0
        self._progress_s = 0.0
        self._check: asyncio.TimerHandle | None = None

    def write(self, payload: bytes) -> None:
        """Send one text message. A closed writer drops it: the connection's end is already under way."""
        if self.closed or self._transport.is_closing():
            return
        frame = text_frame(payload)
        self._written_bytes += len(frame)
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > WRITE_BUFFER_BYTES:
            self._abort(f"the client left more than {WRITE_BUFFER_BYTES >> 10} KiB unread")
        elif self._check is None:
            self._progress_s = self._loop.time()
            self._drained_bytes = self._drained()
            self._check = self._loop.call_later(self._stall_limit_s / PROGRESS_CHECKS, self._check_progress)

    def close(self) -> None:
        """Write nothing more."""
        self.closed = True
        if self._check is not None:
            self._check.cancel()
            self._check = None

    def _drained(self) -> int:
        return self._written_bytes - self._transport.get_write_buffer_size()

    def _check_progress(self) -> None:
        self._check = None
        if self.closed or self._transport.is_closing() or self._transport.get_write_buffer_size() == 0:
            return
        now = self._loop.time()
        drained = self._drained()
        if drained > self._drained_bytes:
            self._drained_bytes = drained
            self._progress_s = now
        elif now - self._progress_s >= self._stall_limit_s:
            self._abort(f"the client read nothing for {self._stall_limit_s:.0f} s")
            return
        self._check = self._loop.call_later(self._stall_limit_s / PROGRESS_CHECKS, self._check_progress)

    def _abort(self, reason: str) -> None:
        self.close()
        self._transport.abort()
        self._on_stalled(reason)
