"""Owns writing to one client without waiting for it, and the bound on what it leaves unread. Gateway's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_LOOKS: Final = 4  # how often a stalled client is checked within the stall limit


class BoundedWriter:
    """Writes straight to a transport from inside the core's callbacks.

    A client that leaves more than `limit_bytes` unread, or reads nothing for `stall_s`, is cut off: the
    transport is aborted and `on_stalled` called once.
    """

    __slots__ = (
        "_drained_bytes",
        "_limit_bytes",
        "_loop",
        "_on_stalled",
        "_progress_s",
        "_stall_s",
        "_timer",
        "_transport",
        "_written_bytes",
        "closed",
    )

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        on_stalled: Callable[[], None],
        *,
        limit_bytes: int,
        stall_s: float,
    ) -> None:
        self.closed = False
        self._transport = transport
        self._on_stalled = on_stalled
        self._loop = asyncio.get_running_loop()
        self._limit_bytes = limit_bytes
        self._stall_s = stall_s
        self._written_bytes = 0
        self._drained_bytes = 0
        self._progress_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        """Send `data`, or drop it if the connection is closing. Raises nothing."""
        transport = self._transport
        if self.closed or transport.is_closing():
            return
        self._written_bytes += len(data)
        transport.write(data)
        unread = transport.get_write_buffer_size()
        if unread == 0:
            return
        if unread > self._limit_bytes:
            self._stall()
        elif self._timer is None:
            self._progress_s = self._loop.time()
            self._drained_bytes = self._written_bytes - unread
            self._timer = self._loop.call_later(self._stall_s / _LOOKS, self._look)

    @property
    def written_bytes(self) -> int:
        """All that was written so far."""
        return self._written_bytes

    @property
    def unread_bytes(self) -> int:
        """What the client has not taken yet; 0 once the connection is closing."""
        return 0 if self.closed or self._transport.is_closing() else self._transport.get_write_buffer_size()

    def abort(self) -> None:
        """Cut the client off at once."""
        self.close()
        self._transport.abort()

    def close(self) -> None:
        """Write nothing more. Idempotent."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        unread = 0 if self._transport.is_closing() else self._transport.get_write_buffer_size()
        if self.closed or unread == 0:
            return
        drained, now_s = self._written_bytes - unread, self._loop.time()
        if drained > self._drained_bytes:
            self._drained_bytes, self._progress_s = drained, now_s
        elif now_s - self._progress_s >= self._stall_s:
            self._stall()
            return
        self._timer = self._loop.call_later(self._stall_s / _LOOKS, self._look)

    def _stall(self) -> None:
        self.close()
        self._transport.abort()
        self._on_stalled()
