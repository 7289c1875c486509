"""Owns the ROUTER socket and the gateways' leases. The I/O thread: the only one that touches the socket.

The decode thread never waits for this one: it leaves messages in the outbox. Encoding happens here, while the decode
thread is waiting for the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog
import zmq

from shared.errors import ErrorCode
from shared.protocol import (
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    NO_MESSAGE,
    PROTOCOL_VERSION,
    Beat,
    Cancel,
    Encode,
    Fatal,
    Hello,
    Ping,
    Prefill,
    Ready,
    Submit,
    decode_from_gateway,
    encode,
    schema_hash,
)
from worker.loop.inbox import Inbox, LeaseEnded, Received
from worker.wire.compiler import GrammarCompiler
from worker.wire.kv_publisher import KvPublisher
from worker.wire.outbox import WireOutbox

log = structlog.get_logger()

BURST = 64  # messages taken from the socket before the outbox gets its turn
SEND_HWM = 10_000  # messages one slow gateway may have queued before its streams see a gap
MIN_LEASE_S, MAX_LEASE_S = 0.5, 60.0
POLL_MS = 250
REPLAY_POLL_MS = 2  # while past events are still to be sent
REMARK_INTERVAL_S = 10.0  # one log line about bad frames in so long


@dataclass(slots=True)
class Lease:
    """One connected gateway."""

    name: str
    lease_s: float
    until_s: float
    asks: bool = False  # it has sent requests, so it needs its share of the places


class Transport:
    """Socket on one side, inbox and outbox on the other. `start` binds; `close` ends the thread.

    Without a compiler, submissions with a grammar go on as they are, and are refused. A publisher's sockets belong to the
    same thread.
    """

    def __init__(
        self,
        endpoint: str,
        inbox: Inbox,
        outbox: WireOutbox,
        *,
        compiler: GrammarCompiler | None = None,
        publisher: KvPublisher | None = None,
        secure: Callable[[zmq.Socket[bytes], zmq.Context[zmq.Socket[bytes]]], Callable[[], None]]
        | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._now = now
        self._inbox = inbox
        self._secure = secure
        self._ready: tuple[Ready, list[bytes]] | None = None
        self._outbox = outbox
        self._compiler = compiler
        self._publisher = publisher
        self._leases: dict[bytes, Lease] = {}
        self._closing = False
        self._bound = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="worker-io", daemon=True)
        self.num_bad_frames = 0
        self.num_dropped = 0
        self._last_remark_s = 0.0
        self._next_expiry_s = 0.0

    # ------------------------------------------------------------------ any thread

    def start(self) -> None:
        """Bind and serve. Raises the error of the bind."""
        self._thread.start()
        self._bound.wait()
        if self._error is not None:
            raise self._error

    def announce(self, ready: Ready, payloads: list[bytes]) -> None:
        """From now on `Hello` is answered with this; until then the gateway keeps asking."""
        self._ready = (ready, payloads)

    @property
    def is_announced(self) -> bool:
        """Whether `Hello` is answered, because the worker serves."""
        return self._ready is not None

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is queued and end the thread."""
        self._closing = True
        self._outbox.wake()
        self._thread.join(timeout_s)

    # ------------------------------------------------------------------ the I/O thread

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        unsecure: Callable[[], None] | None = None
        try:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a vanished gateway is an error, not silence
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
            socket.setsockopt(zmq.SNDHWM, SEND_HWM)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
            socket.setsockopt(zmq.LINGER, 500)
            socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
            if self._secure is not None:
                unsecure = self._secure(socket, context)
            socket.bind(self._endpoint)
            if self._publisher is not None:
                self._publisher.open()
        except Exception as error:
            self._error = error
            self._bound.set()
            socket.close(0)
            if unsecure is not None:
                unsecure()
            context.term()
            if self._publisher is not None:
                self._publisher.close()
            return
        self._bound.set()
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._outbox.bell, zmq.POLLIN)
        publisher = self._publisher
        if publisher is not None and publisher.replay is not None:
            poller.register(publisher.replay, zmq.POLLIN)
        try:
            while not self._closing or len(self._outbox):
                # This thread's work takes the global lock from the decode thread, so it handles only what poll reports.
                is_replaying = publisher is not None and publisher.is_replaying
                ready = [source for source, _ in poller.poll(REPLAY_POLL_MS if is_replaying else POLL_MS)]
                if self._outbox.bell in ready:
                    self._outbox.hush()
                self._turn(socket, has_messages=socket in ready)
                if publisher is not None:
                    publisher.turn(self._outbox.take_kv_events, has_requests=publisher.replay in ready)
        finally:
            socket.close()
            if publisher is not None:
                publisher.close()
            if unsecure is not None:
                unsecure()
            context.term()
            self._outbox.close()

    def _turn(self, socket: zmq.Socket[bytes], *, has_messages: bool = True) -> None:
        """Send messages from the outbox, then handle a burst of received ones, then check the leases."""
        self._flush(socket)
        if has_messages:
            for _ in range(BURST):
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._on_frames(socket, frames)
        if self._now() >= self._next_expiry_s:
            self._next_expiry_s = self._now() + POLL_MS / 1e3
            self._expire_leases()

    def _flush(self, socket: zmq.Socket[bytes]) -> None:
        outbox = self._outbox
        while len(outbox):
            gateway, message, payloads = outbox.take()
            if isinstance(message, Beat):
                num_asking = sum(lease.asks for lease in self._leases.values())
                message = msgspec.structs.replace(message, num_gateways=max(1, num_asking))
            data = encode(message)
            for target in list(self._leases) if gateway is None else [gateway]:
                self._post(socket, target, [data, *payloads])

    def _post(self, socket: zmq.Socket[bytes], gateway: bytes, frames: list[bytes]) -> None:
        try:
            socket.send_multipart([gateway, *frames], zmq.NOBLOCK)
        except zmq.Again:
            self.num_dropped += 1  # the gateway sees the gap in first_index and ends those streams
            self._remark("gateway_too_slow", gateway)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._end_lease(gateway, "gateway_gone")

    def _on_frames(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        """Decode and handle one message; a fault in it affects no other message."""
        gateway = frames[0]
        if len(frames) < 2 or len(frames[1]) > MAX_MESSAGE_BYTES:
            self._on_bad_frame(gateway, "empty or oversized message")
            return
        try:
            message = decode_from_gateway(frames[1])
        except NO_MESSAGE as error:
            self._on_bad_frame(gateway, str(error))
            return
        if isinstance(message, Hello):
            self._on_hello(socket, gateway, message)
            return
        lease = self._leases.get(gateway)
        if lease is None:
            self._on_bad_frame(gateway, "no hello came before it")
            return
        lease.until_s = self._now() + lease.lease_s
        if isinstance(message, Ping):
            return
        lease.asks = lease.asks or isinstance(message, Submit | Encode | Prefill)
        if self._compiler is not None:
            if isinstance(message, Submit) and message.grammar is not None:
                self._compiler.submit(gateway, message, frames[2:])
                return
            if isinstance(message, Cancel):
                self._compiler.cancel(gateway, message.sequence_ids)
        self._inbox.put(Received(gateway, message, frames[2:]))

    def _on_hello(self, socket: zmq.Socket[bytes], gateway: bytes, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION or hello.schema_hash != schema_hash():
            text = (
                f"the gateway speaks protocol {hello.protocol_version} ({hello.schema_hash}), this worker "
                f"{PROTOCOL_VERSION} ({schema_hash()}): run the same version of both"
            )
            log.error("version_skew", gateway=hello.gateway_id, detail=text)
            self._post(socket, gateway, [encode(Fatal(0, ErrorCode.VERSION_SKEW, text))])
            return
        if self._ready is None:
            return  # still loading; the gateway asks again
        lease_s = min(hello.lease_s, MAX_LEASE_S) if hello.lease_s > MIN_LEASE_S else MIN_LEASE_S  # NaN too
        if gateway not in self._leases:
            log.info("gateway_connected", gateway=hello.gateway_id)
        self._leases[gateway] = Lease(hello.gateway_id, lease_s, self._now() + lease_s)
        ready, payloads = self._ready
        self._post(socket, gateway, [encode(ready), *payloads])

    def _expire_leases(self) -> None:
        now_s = self._now()
        for gateway in [g for g, lease in self._leases.items() if lease.until_s < now_s]:
            self._end_lease(gateway, "gateway_lease_expired")

    def _end_lease(self, gateway: bytes, event: str) -> None:
        lease = self._leases.pop(gateway, None)
        if lease is not None:
            log.info(event, gateway=lease.name)  # one that was stopped says no goodbye
            if self._compiler is not None:
                self._compiler.drop_gateway(gateway)
            self._inbox.put(LeaseEnded(gateway))

    def _on_bad_frame(self, gateway: bytes, detail: str) -> None:
        self.num_bad_frames += 1
        self._remark("bad_frame", gateway, detail=detail)

    def _remark(self, event: str, gateway: bytes, **more: str) -> None:
        now_s = self._now()
        if now_s - self._last_remark_s > REMARK_INTERVAL_S:
            self._last_remark_s = now_s
            log.warning(
                event, gateway=gateway.hex()[:16], bad=self.num_bad_frames, dropped=self.num_dropped, **more
            )
