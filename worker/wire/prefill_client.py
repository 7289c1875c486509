"""Owns the sockets to prefill workers, a DEALER each, and the thread worker-pages that moves their frames.

Pages are megabytes: they come here and not through a gateway, nor through the I/O thread that sends tokens. The decode thread
leaves what it wants in a queue, and is told by its inbox.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog
import zmq
from zmq.utils.monitor import parse_monitor_message

from shared.protocol import MAX_PAYLOAD_BYTES, PageFormat
from worker.loop.inbox import Inbox, PrefillEnded, PrefillJob
from worker.wire.prefill_peer import HELLO_S, QUIET_S, PrefillPeer

log = structlog.get_logger()

POLL_MS: Final = 250
BURST: Final = 16  # messages taken from one socket before the others get their turn
MAX_PEERS: Final = 64  # gateways name them; more are turned away
SEND_HWM: Final = 1000

Socket = zmq.Socket[bytes]
SecureClient = Callable[[Socket], None]

# As in `worker.wire.outbox`: ringing keeps Python's lock, so that the other thread runs while the decode thread waits.
_ring = ctypes.PyDLL(None).eventfd_write
_ring.argtypes = (ctypes.c_int, ctypes.c_uint64)


@dataclass(slots=True)
class _Link:
    peer: PrefillPeer
    socket: Socket
    monitor: Socket


class PrefillClient:
    """Implements `loop.inbox.Prefills`. `start` once, `close` once."""

    def __init__(
        self,
        inbox: Inbox,
        name: str,
        secure: SecureClient | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is this worker's in others' logs; `secure` makes a socket of ours a CURVE client."""
        self._inbox = inbox
        self._name = name
        self._secure = secure
        self._now = now
        self._format: PageFormat | None = None
        self._asked: deque[PrefillJob | int] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._links: dict[str, _Link] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="worker-pages", daemon=True)

    # ------------------------------------------------------------------ other threads

    def start(self, format: PageFormat) -> None:
        """Begin; `format` is that of this worker's pages."""
        self._format = format
        self._thread.start()

    def ask(self, job: PrefillJob) -> None:
        """See `Prefills`."""
        self._asked.append(job)
        _ring(self._bell, 1)

    def cancel(self, job_id: int) -> None:
        """See `Prefills`."""
        self._asked.append(job_id)
        _ring(self._bell, 1)

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread."""
        self._closing = True
        os.eventfd_write(self._bell, 1)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        context: zmq.Context[Socket] = zmq.Context()
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        next_tick_s = self._now()
        try:
            while not self._closing:
                ready = {source for source, _ in poller.poll(POLL_MS)}
                if self._bell in ready:
                    os.eventfd_read(self._bell)
                try:
                    self._take_asked(context, poller)
                    for link in list(self._links.values()):
                        if link.monitor in ready:
                            self._on_monitor(link)
                        if link.socket in ready:
                            self._receive(link)
                    if self._now() >= next_tick_s:
                        next_tick_s = self._now() + HELLO_S
                        self._tick(poller)
                except Exception:  # one message's fault: prompts that wait for it go on when their time is up
                    log.exception("prefill_client_failed")
        finally:
            for link in self._links.values():
                _close(link)
            context.term()

    def _take_asked(self, context: zmq.Context[Socket], poller: zmq.Poller) -> None:
        while self._asked:
            asked = self._asked.popleft()
            if isinstance(asked, int):
                for other in self._links.values():
                    other.peer.cancel(asked)
                continue
            link = self._links.get(asked.endpoint)
            if link is None:
                try:
                    link = self._connect(asked.endpoint, context, poller)
                except (zmq.ZMQError, ValueError, OSError) as error:
                    self._inbox.put(PrefillEnded(asked.job_id, "lost", f"{asked.endpoint}: {error}"))
                    continue
            link.peer.ask(asked, self._now())

    def _connect(self, endpoint: str, context: zmq.Context[Socket], poller: zmq.Poller) -> _Link:
        """Raises `zmq.ZMQError` for what is no address, ValueError where there are too many."""
        if len(self._links) >= MAX_PEERS:
            raise ValueError(f"{MAX_PEERS} prefill workers are known already")
        assert self._format is not None
        socket = context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, SEND_HWM)
            socket.setsockopt(zmq.RCVHWM, 0)  # what may be on its way is bounded by what was asked for
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
            socket.setsockopt(zmq.IPV6, endpoint.startswith("tcp://["))
            socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
            if self._secure is not None and endpoint.startswith("tcp://"):
                self._secure(socket)
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
            socket.connect(endpoint)
        except Exception:
            socket.close(0)
            raise
        peer = PrefillPeer(
            endpoint, self._format, self._name, partial(_post, socket), self._inbox.put, self._now()
        )
        link = self._links[endpoint] = _Link(peer, socket, monitor)
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        return link

    def _receive(self, link: _Link) -> None:
        for _ in range(BURST):
            try:
                frames = link.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            # A message that is copied by nobody until the decode thread puts its pages where they belong.
            link.peer.on_frames([frame.buffer for frame in frames], self._now())

    def _on_monitor(self, link: _Link) -> None:
        while True:
            try:
                event = parse_monitor_message(link.monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_DISCONNECTED:
                self._receive(link)  # what it said before it died still counts
                link.peer.on_lost("its connection closed")
            else:
                link.peer.on_time(self._now())  # a hello at once

    def _tick(self, poller: zmq.Poller) -> None:
        now_s = self._now()
        for link in list(self._links.values()):
            link.peer.on_time(now_s)
            if not link.peer.num_jobs and now_s - link.peer.asked_s > QUIET_S:
                for socket in (link.socket, link.monitor):
                    poller.unregister(socket)
                _close(link)
                del self._links[link.peer.endpoint]


def _post(socket: Socket, frames: list[bytes]) -> bool:
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.ZMQError:
        return False
    return True


def _close(link: _Link) -> None:
    link.socket.disable_monitor()
    link.monitor.close(0)
    link.socket.close(0)
