"""Stands for ZeroMQ's DEALER, ROUTER and what lies between, under a test's control: nothing moves by itself.

What of the real sockets matters here is kept: a DEALER's descriptor is edge-triggered and any look at the socket may
eat the edge; the monitor tells of lost and new connections; a new connection has a new identity; a ROUTER says
EHOSTUNREACH for one that is gone and EAGAIN for one whose queue is full.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

import zmq

from tests.unit.wire.virtual_loop import VirtualLoop

Frames = list[bytes]


class Connection:
    """One established connection: two queues, and the identity the ROUTER knows it by."""

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.to_worker: deque[Frames] = deque()
        self.to_gateway: deque[Frames] = deque()


class Wire:
    """Everything between one DEALER and whichever ROUTER serves its endpoint at the moment."""

    def __init__(self, side: bytes = b"\0") -> None:
        """`side`: what identities begin with, where one ROUTER serves several."""
        self.dealer: Dealer | PageDealer | None = None
        self.router: Router | None = None
        self._side = side
        self.connection: Connection | None = None
        self.hwm = 10_000  # frames a direction holds
        self.late: list[Frames] = []  # to the gateway, from connections that are no more
        self.late_to_worker: list[Frames] = []
        self.tap: Callable[[Frames], None] = lambda frames: None  # sees what the gateway sends
        self._identities = count(1)

    def connect(self) -> None:
        """Establish a connection if both ends are there and none is."""
        if self.connection is None and self.dealer is not None and self.router is not None:
            self.connection = Connection(self._side + b"%04d" % next(self._identities))
            self.dealer.asleep = False
            self.dealer.signalled = True
            self.dealer.monitor.tell(zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def disconnect(self, num_arriving: int = 0) -> None:
        """Break it; the first so many frames on their way to the gateway still arrive, before the news of it."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        for _ in range(min(num_arriving, len(connection.to_gateway))):
            self._arrive(connection.to_gateway.popleft())
        self.late.extend(connection.to_gateway)
        self.late_to_worker.extend(connection.to_worker)
        if self.dealer is not None:
            self.dealer.monitor.tell(zmq.EVENT_DISCONNECTED)

    def deliver_to_gateway(self, most: int = 10_000) -> int:
        """Move up to so many frames into the DEALER; returns how many."""
        connection = self.connection
        if connection is None:
            return 0
        num = min(most, len(connection.to_gateway))
        for _ in range(num):
            self._arrive(connection.to_gateway.popleft())
        return num

    def deliver_to_worker(self, most: int = 10_000) -> int:
        """Move up to so many frames into the ROUTER; returns how many."""
        connection, router = self.connection, self.router
        if connection is None or router is None:
            return 0
        num = min(most, len(connection.to_worker))
        for _ in range(num):
            router.received.append([connection.identity, *connection.to_worker.popleft()])
        return num

    def _arrive(self, frames: Frames) -> None:
        if self.dealer is not None:
            self.dealer.arrive(frames)


class Monitor:
    """A DEALER's monitor socket."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._events: deque[int] = deque()
        self.signalled = False

    def tell(self, event: int) -> None:
        self._events.append(event)
        self.signalled = True

    def fileno(self) -> int:
        return self._number

    def recv_multipart(self, flags: int = 0) -> Frames:
        self.signalled = False
        if not self._events:
            raise zmq.Again
        return [struct.pack("=hi", self._events.popleft(), 0), b""]

    def close(self, linger: int = 0) -> None:
        pass


class Dealer:
    """The gateway's end."""

    def __init__(self, context: Context, number: int) -> None:
        self._context = context
        self._number = number
        self._wire: Wire | None = None
        self.monitor = Monitor(number + 1)
        self.received: deque[Frames] = deque()
        self._rest: Frames = []  # of the message under way
        self.signalled = False
        self.asleep = False  # a read found it empty: only now does an arrival signal the descriptor
        self.closed = False

    def arrive(self, frames: Frames) -> None:
        self.received.append(frames)
        if self.asleep:
            self.asleep, self.signalled = False, True

    def setsockopt(self, option: int, value: Any) -> None:
        pass

    def get_monitor_socket(self, events: int) -> Monitor:
        return self.monitor

    def disable_monitor(self) -> None:
        pass

    def fileno(self) -> int:
        return self._number

    def connect(self, endpoint: str) -> None:
        self._wire = self._context.wires[endpoint]
        self._wire.dealer = self
        self._wire.connect()

    def get(self, option: int) -> int:
        if option == zmq.RCVMORE:
            return int(bool(self._rest))
        return self.getsockopt(option)

    def getsockopt(self, option: int) -> int:
        assert option == zmq.EVENTS
        self.signalled = False
        if not self.received:
            self.asleep = True
        return zmq.POLLIN if self.received else 0

    def send(self, message: bytes, flags: int = 0) -> None:
        self.send_multipart([message], flags)

    def send_multipart(self, frames: Frames, flags: int = 0, copy: bool = True) -> None:
        assert flags & zmq.NOBLOCK and not self.closed
        self.signalled = False  # sending looks at the same mailbox, and may eat the edge
        wire = self._wire
        if wire is None or wire.connection is None or len(wire.connection.to_worker) >= wire.hwm:
            raise zmq.Again
        wire.tap(frames)
        wire.connection.to_worker.append(list(frames))

    def recv_multipart(self, flags: int = 0) -> Frames:
        assert flags & zmq.NOBLOCK and not self.closed
        self.signalled = False
        if not self.received:
            self.asleep = True
            raise zmq.Again
        return self.received.popleft()

    def recv(self, flags: int = 0) -> bytes:
        frames = self._rest or self.recv_multipart(flags)
        self._rest = frames[1:]
        return frames[0]

    def close(self, linger: int = 0) -> None:
        self.closed = True
        if self._wire is not None:
            self._wire.disconnect()
            self._wire.dealer = None


class PageDealer:
    """A worker's end towards a prefill worker: its thread polls, so there is nothing to wake."""

    def __init__(self, between: Wire) -> None:
        self.monitor = Monitor(-1)
        self.asleep = self.signalled = False
        self.received: deque[Frames] = deque()
        self._wire = between
        between.dealer = self
        between.connect()

    def arrive(self, frames: Frames) -> None:
        self.received.append(frames)

    def send(self, frames: Frames) -> bool:
        """As `zmq.NOBLOCK` does: False where it would block."""
        connection = self._wire.connection
        if connection is None or len(connection.to_worker) >= self._wire.hwm:
            return False
        connection.to_worker.append(list(frames))
        return True

    def close(self) -> None:
        self._wire.disconnect()
        self._wire.dealer = None


class Router:
    """A worker's end. Poll-driven in the real one, so without a descriptor here. It serves any number of wires."""

    def __init__(self, *wires: Wire) -> None:
        self._wires = wires
        self.received: deque[Frames] = deque()

    def bind(self) -> None:
        """Take the endpoint over."""
        for between in self._wires:
            between.router = self
            between.connect()

    def unbind(self, num_arriving: int) -> None:
        """Die: the connections break."""
        for between in self._wires:
            between.disconnect(num_arriving)
            between.router = None

    def send_multipart(self, frames: Frames, flags: int = 0) -> None:
        for between in self._wires:
            connection = between.connection
            if connection is None or connection.identity != frames[0]:
                continue
            if len(connection.to_gateway) >= between.hwm:
                raise zmq.Again
            connection.to_gateway.append(list(frames[1:]))
            return
        raise zmq.ZMQError(zmq.EHOSTUNREACH)

    def recv_multipart(self, flags: int = 0) -> Frames:
        if not self.received:
            raise zmq.Again
        return self.received.popleft()


class Context:
    """Makes DEALERs whose descriptors a `VirtualLoop` can watch."""

    def __init__(self, loop: VirtualLoop, wires: dict[str, Wire]) -> None:
        self.wires = wires
        self._loop = loop

    def socket(self, kind: int) -> Dealer:
        assert kind == zmq.DEALER
        number = 2 * len(self._loop.readables)
        dealer = Dealer(self, number)
        self._loop.readables[number] = dealer
        self._loop.readables[number + 1] = dealer.monitor
        return dealer

    def destroy(self, linger: int = 0) -> None:
        pass
