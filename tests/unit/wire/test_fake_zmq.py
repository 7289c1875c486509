"""The stand-in for ZeroMQ keeps what the real sockets keep: each scene runs over both."""

from __future__ import annotations

import select
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.unit.wire.fake_zmq import Context, Router, Wire
from tests.unit.wire.virtual_loop import VirtualLoop
from worker.sim.timeline import VirtualClock

PATIENCE_S = 5.0


class FakeEnds:
    """A DEALER and a ROUTER over a wire that delivers at once when asked to settle."""

    def __init__(self) -> None:
        self.loop = VirtualLoop.on(VirtualClock())
        self.wire = Wire()
        self.dealer: Any = Context(self.loop, {"here": self.wire}).socket(zmq.DEALER)
        self.monitor: Any = self.dealer.get_monitor_socket(0)
        self.router: Any = Router(self.wire)
        self.dealer.connect("here")

    def bind(self, hwm: int = 1000) -> None:
        self.router = Router(self.wire)
        self.wire.hwm = hwm
        self.router.bind()

    def unbind(self) -> None:
        self.router.unbind(num_arriving=0)

    def until(self, condition: Callable[[], bool]) -> None:
        self.wire.deliver_to_gateway()
        self.wire.deliver_to_worker()
        assert condition()

    def is_signalled(self) -> bool:
        self.wire.deliver_to_gateway()
        return bool(self.dealer.signalled)

    def close(self) -> None:
        self.dealer.close()


class RealEnds:
    """The same over ZeroMQ, with the gateway's and the worker's options."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/s"
        self.context = zmq.Context()
        self.dealer: Any = self.context.socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.IMMEDIATE, 1)
        self.dealer.setsockopt(zmq.RECONNECT_IVL, 10)
        self.monitor: Any = self.dealer.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        self.dealer.connect(self.endpoint)
        self.router: Any = None

    def bind(self, hwm: int = 1000) -> None:
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.setsockopt(zmq.SNDHWM, hwm)
        self.router.bind(self.endpoint)

    def unbind(self) -> None:
        self.router.close(0)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wakes at least every few milliseconds, sooner when a socket has something."""
        poller = zmq.Poller()
        for socket in (self.monitor, self.router):
            if socket is not None and not socket.closed:
                poller.register(socket, zmq.POLLIN)
        for _ in range(int(PATIENCE_S / 0.005)):
            if condition():
                return
            poller.poll(5)
        raise AssertionError("it never came to that")

    def is_signalled(self) -> bool:
        return bool(select.select([self.dealer.fileno()], [], [], 0.2)[0])

    def close(self) -> None:
        self.dealer.disable_monitor()
        self.context.destroy(0)


Ends = FakeEnds | RealEnds


@pytest.fixture(params=["fake", "real"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ends]:
    made: Ends = FakeEnds() if request.param == "fake" else RealEnds(tmp_path)
    yield made
    made.close()


def told(ends: Ends, event: int) -> bool:
    """The monitor's next event is this one."""
    try:
        frames = ends.monitor.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return False
    assert struct.unpack("=hi", frames[0])[0] == event
    return True


def take(socket: Any, into: list[list[bytes]]) -> bool:
    """Read what is there; whether it was empty in the end, as the gateway reads to the end of the edge."""
    while True:
        try:
            into.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return True


def is_refused(socket: Any) -> bool:
    """Nothing can be sent."""
    try:
        socket.send_multipart([b"a"], zmq.NOBLOCK)
    except zmq.Again:
        return True
    return False


def connect(ends: Ends, hwm: int = 1000) -> bytes:
    """Bring the ROUTER up and let it know the DEALER; returns the DEALER's identity."""
    ends.bind(hwm)
    ends.until(lambda: told(ends, zmq.EVENT_HANDSHAKE_SUCCEEDED))
    ends.dealer.send(b"hello", zmq.NOBLOCK)
    got: list[list[bytes]] = []
    ends.until(lambda: take(ends.router, got) and len(got) == 1)
    assert got[0][1:] == [b"hello"]
    return got[0][0]


def test_nothing_queues_for_nobody(ends: Ends) -> None:
    with pytest.raises(zmq.Again):
        ends.dealer.send_multipart([b"a"], zmq.NOBLOCK)


def test_frames_arrive_whole_and_in_order(ends: Ends) -> None:
    identity = connect(ends)
    for number in range(20):
        ends.dealer.send_multipart([b"%d" % number, b"payload"], zmq.NOBLOCK)
        ends.router.send_multipart([identity, b"%d" % number, b"reply"], zmq.NOBLOCK)
    up: list[list[bytes]] = []
    down: list[list[bytes]] = []
    ends.until(lambda: take(ends.router, up) and len(up) == 20)
    ends.until(lambda: take(ends.dealer, down) and len(down) == 20)
    assert up == [[identity, b"%d" % number, b"payload"] for number in range(20)]
    assert down == [[b"%d" % number, b"reply"] for number in range(20)]


def test_a_stranger_is_unreachable(ends: Ends) -> None:
    connect(ends)
    with pytest.raises(zmq.ZMQError) as caught:
        ends.router.send_multipart([b"nobody", b"a"], zmq.NOBLOCK)
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_a_full_queue_says_so_and_loses_nothing_it_took(ends: Ends) -> None:
    identity = connect(ends, hwm=5)
    sent = 0
    with pytest.raises(zmq.Again):
        for sent in range(100_000):
            ends.router.send_multipart([identity, b"%d" % sent, bytes(10_000)], zmq.NOBLOCK)
    got: list[list[bytes]] = []
    ends.until(lambda: take(ends.dealer, got) and len(got) >= sent)
    assert [int(frames[0]) for frames in got] == list(range(sent))


def test_a_lost_worker_is_told_and_its_successor_knows_a_new_identity(ends: Ends) -> None:
    before = connect(ends)
    ends.unbind()
    ends.until(lambda: told(ends, zmq.EVENT_DISCONNECTED))
    ends.until(lambda: is_refused(ends.dealer))  # the real one may still take a frame or two, which are lost
    after = connect(ends)
    assert after != before
    with pytest.raises(zmq.ZMQError) as caught:
        ends.router.send_multipart([before, b"a"], zmq.NOBLOCK)
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_the_descriptor_tells_of_an_arrival_once_and_a_look_eats_it(ends: Ends) -> None:
    identity = connect(ends)
    got: list[list[bytes]] = []
    assert take(ends.dealer, got) and not got  # only what was found empty is told of the next arrival
    ends.router.send_multipart([identity, b"a"], zmq.NOBLOCK)
    assert ends.is_signalled()
    assert ends.dealer.getsockopt(zmq.EVENTS) & zmq.POLLIN
    assert not ends.is_signalled(), "a look ate the edge, though the message is still there"
    assert take(ends.dealer, got) and got == [[b"a"]]
    ends.router.send_multipart([identity, b"b"], zmq.NOBLOCK)
    assert ends.is_signalled()
