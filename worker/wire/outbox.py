"""Owns the queue of messages to gateways and the bell that wakes the I/O thread. Any thread leaves, the I/O thread takes."""

from __future__ import annotations

import ctypes
import os
from collections import deque

from shared.protocol import FromWorker
from worker.schedule.kv_events import KvEvent

# eventfd_write that keeps Python's lock. os.eventfd_write releases it: the I/O thread would take the lock at once and
# the decode thread wait for it in the middle of a step. So the I/O thread runs while the decode thread waits for the device.
_ring = ctypes.PyDLL(None).eventfd_write
_ring.argtypes = (ctypes.c_int, ctypes.c_uint64)


class WireOutbox:
    """Implements `loop.inbox.Outbox`. `bell` is a descriptor that can be read while messages wait."""

    def __init__(self) -> None:
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._messages: deque[tuple[bytes | None, FromWorker, list[bytes]]] = deque()
        self._kv_events: deque[list[KvEvent]] = deque()

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        """Leave a message for one gateway."""
        self._messages.append((gateway, message, payloads or []))
        _ring(self.bell, 1)

    def broadcast(self, message: FromWorker) -> None:
        """Leave a message for every gateway with a lease."""
        self._messages.append((None, message, []))
        _ring(self.bell, 1)

    def publish(self, events: list[KvEvent]) -> None:
        """Leave what the prefix cache remembered and forgot, for whoever listens (worker.wire.kv_publisher)."""
        self._kv_events.append(events)
        _ring(self.bell, 1)

    def wake(self) -> None:
        """Wake the I/O thread without leaving a message."""
        os.eventfd_write(self.bell, 1)

    # ------------------------------------------------------------------ the I/O thread

    def __len__(self) -> int:
        return len(self._messages)

    def take(self) -> tuple[bytes | None, FromWorker, list[bytes]]:
        """The oldest message: its gateway (None: every one), itself, its payloads. Raises IndexError when none waits."""
        return self._messages.popleft()

    def take_kv_events(self) -> list[KvEvent]:
        """The oldest events left; empty when there are none."""
        return self._kv_events.popleft() if self._kv_events else []

    def hush(self) -> None:
        """Reset the bell after the I/O thread has woken."""
        os.eventfd_read(self.bell)

    def close(self) -> None:
        """Give the descriptor back; nothing may be left here afterwards."""
        os.close(self.bell)
