"""Owns writing to one client without waiting for it, and the bound on what it leaves unread. Gateway's loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

from gateway.generation import Carrier

_send = os.write
_LOOKS: Final = 4  # how often a stalled client is checked within the stall limit


class BoundedWriter:
    """Writes straight to a transport from inside the core's callbacks.

    Where the transport has nothing left to send, the bytes go to the kernel without it: half of a token's time in a
    transport is not the kernel's. `write_soon` is for several streams on one connection: what they say in one turn of the
    loop leaves together.

    A client that leaves more than `limit_bytes` unread, or reads nothing for `stall_s`, is cut off: the
    transport is aborted and `on_stalled` called once.
    """

    __slots__ = (
        "_descriptor",
        "_drained_bytes",
        "_held",
        "_limit_bytes",
        "_loop",
        "_on_stalled",
        "_progress_s",
        "_stall_s",
        "_timer",
        "_transport",
        "_written_bytes",
        "carrier",
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
        self._descriptor = _descriptor(transport)
        self._held: list[bytes] = []
        self._on_stalled = on_stalled
        self._loop = asyncio.get_running_loop()
        self._limit_bytes = limit_bytes
        self._stall_s = stall_s
        self.carrier: Carrier | None = None  # writes one stream's tokens past this writer
        self._written_bytes = 0
        self._drained_bytes = 0
        self._progress_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        """Send `data`, or drop it if the connection is closing. Raises nothing."""
        if self._held:
            self._held.append(data)
            data = b"".join(self._held)
            self._held.clear()
        if self.closed or self._transport.is_closing():
            return
        size = len(data)
        self._written_bytes += size
        if self._descriptor >= 0 and not self._transport.get_write_buffer_size():
            try:
                sent = _send(self._descriptor, data)
            except OSError:
                sent = 0  # its buffer is full, or the client is gone: the transport finds out which
            if sent == size:
                return
            data = data[sent:]
        if self.carrier is not None:
            self.carrier.come_home()  # what the transport holds back must leave first
        self._transport.write(data)
        unread = self._transport.get_write_buffer_size()
        if unread == 0:
            return
        if unread > self._limit_bytes:
            self._stall()
        elif self._timer is None:
            self._progress_s = self._loop.time()
            self._drained_bytes = self._written_bytes - unread
            self._timer = self._loop.call_later(self._stall_s / _LOOKS, self._look)

    def write_soon(self, data: bytes) -> None:
        """Send `data` with what else is said in this turn of the loop. Raises nothing."""
        if self.carrier is not None:
            self.carrier.come_home()
        if not self._held:
            self._loop.call_soon(self._write_held)
        self._held.append(data)

    def _write_held(self) -> None:
        if self._held:
            self.write(self._held.pop())

    # ------------------------------------------------------------ lending the connection

    def lendable(self) -> int:
        """The connection's descriptor for a carrier, which asks `is_closing` before every step: a closed descriptor's number
        may be another connection's before anybody here hears of it. −1 while nobody else may write."""
        if self.closed or self._held or self.carrier is not None:
            return -1
        if self._transport.is_closing() or self._transport.get_write_buffer_size():
            return -1
        return self._descriptor

    @property
    def is_closing(self) -> Callable[[], bool]:
        """Tells whether the connection is closed, or about to be."""
        return self._transport.is_closing

    @property
    def others_wait(self) -> Callable[[], int]:
        """Tells how many bytes wait in the transport, whoever wrote them."""
        return self._transport.get_write_buffer_size

    def take_back(self, written_bytes: int) -> None:
        """The carrier wrote so much, and writes no more."""
        self.carrier = None
        self._written_bytes += written_bytes

    @property
    def written_bytes(self) -> int:
        """All bytes so far."""
        return self._written_bytes + (0 if self.carrier is None else self.carrier.written_bytes())

    @property
    def unread_bytes(self) -> int:
        """What the client has not taken yet; 0 once the connection is closing."""
        return 0 if self.closed or self._transport.is_closing() else self._transport.get_write_buffer_size()

    def abort(self) -> None:
        """Cut the client off at once."""
        self.close()
        self._transport.abort()

    def close(self) -> None:
        """Write nothing more, after what `write_soon` still holds. Idempotent."""
        if self.carrier is not None:
            self.carrier.come_home()
        self._write_held()
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
        self._held.clear()
        self.close()
        self._transport.abort()
        self._on_stalled()


def _descriptor(transport: asyncio.WriteTransport) -> int:
    """The socket that a transport writes to as it is; −1 where it has none, or changes what is written."""
    if transport.get_extra_info("ssl_object") is not None:
        return -1
    sock = transport.get_extra_info("socket")
    return sock.fileno() if sock is not None else -1
