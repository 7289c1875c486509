"""Owns one DEALER socket to one worker: hello, heartbeats, epochs, and draining it. Runs on the gateway's loop.

The ZeroMQ descriptor is watched with `loop.add_reader`; it is edge-triggered, so EVENTS is looked at again
after every send and after every bounded burst of receives, and nothing raised for one message escapes the
drain: a missed edge would stall this worker's streams for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog
import zmq
import zmq.auth
from zmq.utils.monitor import parse_monitor_message

from gateway.config import ConfigError
from gateway.faults import fault_fields
from gateway.generation import RequestError
from shared import protocol as wire
from shared.errors import ErrorCode

_BURST: Final = 64  # messages handled before the loop gets its turn
_HELLO_S: Final = 0.25
_REFUSED_HELLO_S: Final = 5.0
_PING_S: Final = 1.0
_LEASE_S: Final = 5.0
_SEND_HWM: Final = 4096
_WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH

log = structlog.get_logger(__name__)


class WorkerEvents(Protocol):
    """Told what a worker says, in order, on the loop."""

    def on_ready(self, link: WorkerLink, tokenizer_json: bytes, chat_template: bytes) -> None:
        """A worker (or a new epoch of it) serves `link.ready`."""

    def on_outputs(self, link: WorkerLink, outputs: wire.StepOutputs) -> None:
        """One step's tokens."""

    def on_rejected(self, link: WorkerLink, rejected: wire.Rejected) -> None:
        """A submit that never became a sequence."""

    def on_beat(self, link: WorkerLink, beat: wire.Beat) -> None:
        """The decode thread made progress."""

    def on_lost(self, link: WorkerLink, error: RequestError) -> None:
        """Everything in flight on this link is lost. The link goes on trying to reach a worker."""

    def on_trace(self, link: WorkerLink, trace: bytes) -> None:
        """A recording that was asked for."""


class WorkerLink:
    """One endpoint. `ready` is set while a worker there serves and makes progress."""

    def __init__(
        self,
        endpoint: str,
        events: WorkerEvents,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        gateway_id: str,
        progress_timeout_s: float,
        curve_key_dir: str | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self.ready: wire.Ready | None = None
        self.beat: wire.Beat | None = None
        self.lost_epoch = -1  # of the worker last lost
        self.state = "connecting"  # connecting | ready | refused | closed
        self.anomalies: Counter[str] = Counter()
        self._events = events
        self._gateway_id = gateway_id
        self._progress_timeout_s = progress_timeout_s
        self._now = now
        self._progress_s = 0.0
        self._hello_s = 0.0
        self._ping_s = 0.0
        self._drain_scheduled = False
        self._refusal = ""
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = _SEND_HWM
        self._socket.rcvhwm = 0  # the worker bounds what it sends; a drop here would be a silent gap
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues for a worker that is not there
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        if endpoint.startswith("tcp://") and curve_key_dir is not None:
            use_curve(self._socket, Path(curve_key_dir))
        self._monitor = self._socket.get_monitor_socket(_WATCHED)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ life

    def open(self) -> None:
        """Connect and start timers; call once, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._on_readable)
        self._loop.add_reader(self._monitor.fileno(), self._on_monitor)
        self._on_monitor()  # a pipe signals its descriptor only after a first read found it empty
        self._socket.connect(self.endpoint)
        self._tick()

    def close(self) -> None:
        """Leave: no more events. Idempotent."""
        if self.state == "closed" or self._loop is None:
            return
        self.state, self.ready = "closed", None
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    @property
    def epoch(self) -> int:
        """The serving worker's epoch; −1 when none serves."""
        return self.ready.epoch if self.ready is not None else -1

    @property
    def refusal(self) -> str:
        """Why this link cannot work with the worker it found, if so."""
        return self._refusal

    # ------------------------------------------------------------ sending

    def submit(self, submit: wire.Submit, payloads: list[bytes]) -> None:
        """Send one request. Raises `RequestError` WORKER_LOST or QUEUE_FULL; never blocks."""
        if self.ready is None:
            raise RequestError(ErrorCode.WORKER_LOST, "the worker went away")
        self._send([wire.encode(submit), *payloads])

    def cancel(self, sequence_ids: list[int]) -> None:
        """Tell the worker to stop sequences. Best effort: an unreachable worker's lease runs out by itself."""
        if self.ready is None or not sequence_ids:
            return
        try:
            self._send([wire.encode(wire.Cancel(self.epoch, sequence_ids))])
        except RequestError:
            self._note("cancel_not_sent")

    def trace(self, num_steps: int) -> None:
        """Ask for a recording of the next steps. Raises `RequestError`."""
        if self.ready is None:
            raise RequestError(ErrorCode.LOADING, "no worker serves")
        self._send([wire.encode(wire.Trace(num_steps))])

    def _send(self, frames: list[bytes]) -> None:
        try:
            # Small frames are copied anyway; large ones (pixels) are handed over without a copy.
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames) == 1)
        except zmq.Again:
            self._note("send_queue_full")
            raise RequestError(
                ErrorCode.QUEUE_FULL,
                "the worker does not take requests as fast as they come",
                retry_after_s=1.0,
            ) from None
        except zmq.ZMQError as error:
            self._note("send_failed")
            raise RequestError(ErrorCode.WORKER_LOST, f"the worker cannot be reached: {error}") from None
        finally:
            self._recheck()

    def _recheck(self) -> None:
        """A send may have eaten the descriptor's edge: look, and drain in the loop's next turn."""
        if self._drain_scheduled or self._loop is None or self.state == "closed":
            return
        if self._has_input():
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _has_input(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    # ------------------------------------------------------------ receiving

    def _on_readable(self) -> None:
        if not self._drain_scheduled:
            self._drain()

    def _drain(self) -> None:
        self._drain_scheduled = False
        for _ in range(_BURST):
            if self.state == "closed":
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                self._note("receive_failed", reason=str(error))
                return
            try:
                self._on_frames(frames)
            except msgspec.DecodeError as error:  # ValidationError is one
                self._note("malformed", reason=str(error)[:200])
            except Exception as fault:
                self._note("failed_message", **fault_fields(fault))
        self._drain_scheduled = True
        if self._loop is not None:
            self._loop.call_soon(self._drain)

    def _on_frames(self, frames: list[bytes]) -> None:
        if len(frames[0]) > wire.MAX_MESSAGE_BYTES:
            self._note("oversized")
            return
        message = wire.decode_from_worker(frames[0])
        if isinstance(message, wire.StepOutputs):
            if message.epoch != self.epoch:
                self._note("stale_epoch")
                return
            self._progress_s = self._now()
            self._events.on_outputs(self, message)
        elif isinstance(message, wire.Beat):
            if message.epoch != self.epoch:
                self._note("stale_epoch")
                if self.ready is None:
                    self._hello_s = 0.0
                else:
                    self._send_hello()  # perhaps a restarted worker: ask
                return
            self._progress_s = self._now()
            self.beat = message
            self._events.on_beat(self, message)
        elif isinstance(message, wire.Ready):
            self._on_ready(message, frames)
        elif isinstance(message, wire.Rejected):
            if message.epoch != self.epoch:
                self._note("stale_epoch")
                return
            self._events.on_rejected(self, message)
        elif isinstance(message, wire.Fatal):
            self._on_fatal(message)
        else:
            self._events.on_trace(self, frames[1] if len(frames) > 1 else b"")

    def _on_ready(self, ready: wire.Ready, frames: list[bytes]) -> None:
        if ready.protocol_version != wire.PROTOCOL_VERSION or ready.schema_hash != wire.schema_hash():
            self._refuse(
                f"worker speaks protocol {ready.protocol_version} ({ready.schema_hash}), this gateway "
                f"{wire.PROTOCOL_VERSION} ({wire.schema_hash()}); install the same version on both sides"
            )
            return
        if ready.epoch == self.epoch:
            self._progress_s = self._now()
            return  # an answer to a repeated hello
        if self.ready is not None and ready.epoch == self.lost_epoch:
            self._note("stale_epoch")  # the dead worker's last word, come late
            return
        if len(frames) < 3:
            self._note("malformed", reason="Ready without its two payload frames")
            return
        if self.ready is not None:
            self._lose(RequestError(ErrorCode.WORKER_LOST, "the worker restarted"))
        self.ready, self.beat = ready, None
        self._progress_s = self._now()
        self.state, self._refusal = "ready", ""
        log.info("worker_ready", endpoint=self.endpoint, epoch=ready.epoch, model=ready.model.model_id)
        self._events.on_ready(self, frames[1], frames[2])

    def _on_fatal(self, fatal: wire.Fatal) -> None:
        if fatal.code is ErrorCode.VERSION_SKEW:
            self._refuse(fatal.message)
            return
        if self.ready is None or fatal.epoch != self.epoch:
            self._note("stale_epoch")
            return
        log.error("worker_fatal", endpoint=self.endpoint, code=fatal.code.value)
        self._lose(RequestError(fatal.code, fatal.message or "the worker ended"))

    def _refuse(self, message: str) -> None:
        if self._refusal != message:
            log.error("version_skew", endpoint=self.endpoint, reason=message)
        self._refusal = message
        self._lose(RequestError(ErrorCode.VERSION_SKEW, message))
        self.state = "refused"

    def disown(self, message: str) -> None:
        """Refuse a worker for what its `Ready` says (an unusable tokenizer); other workers are unaffected."""
        self._refuse(message)

    def _lose(self, error: RequestError) -> None:
        was_ready, self.ready = self.ready, None
        if self.state != "closed":
            self.state = "connecting"
        self._hello_s = 0.0
        if was_ready is not None:
            self.beat, self.lost_epoch = None, was_ready.epoch
            self._events.on_lost(self, error)

    # ------------------------------------------------------------ timers and the monitor

    def _tick(self) -> None:
        """Hello until ready, then pings; a decode thread silent for too long is a lost worker."""
        assert self._loop is not None
        self._timer = self._loop.call_later(_HELLO_S, self._tick)
        try:
            now_s = self._now()
            if self.ready is None:
                wait_s = _REFUSED_HELLO_S if self.state == "refused" else _HELLO_S
                if now_s - self._hello_s >= wait_s * 0.9:
                    self._send_hello()
            elif now_s - self._progress_s >= self._progress_timeout_s:
                self._drain()  # what has arrived counts, however late this loop looks
                if self.ready is not None and self._now() - self._progress_s >= self._progress_timeout_s:
                    silent_s = self._now() - self._progress_s
                    log.error("worker_silent", endpoint=self.endpoint, silent_s=round(silent_s, 1))
                    message = f"the worker made no progress for {silent_s:.1f} s"
                    self._lose(RequestError(ErrorCode.WORKER_LOST, message))
            elif now_s - self._ping_s >= _PING_S * 0.9:
                self._ping_s = now_s
                self._send_quietly(wire.encode(wire.Ping(self.epoch, now_s)))
        except Exception as fault:  # the timer must go on whatever one tick met
            self._note("failed_tick", **fault_fields(fault))

    def _send_hello(self) -> None:
        self._hello_s = self._now()
        hello = wire.Hello(wire.PROTOCOL_VERSION, wire.schema_hash(), self._gateway_id, _LEASE_S)
        self._send_quietly(wire.encode(hello))

    def _send_quietly(self, message: bytes) -> None:
        try:
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            pass  # nobody there yet; the next tick tries again
        finally:
            self._recheck()

    def _on_monitor(self) -> None:
        """A closed connection tells of a killed worker at once, long before its heartbeat is missed."""
        lost = connected = False
        while self.state != "closed":
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.ZMQError:
                break
            lost |= event == zmq.EVENT_DISCONNECTED
            connected |= event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._note("curve_refused")
        if lost and self.ready is not None:
            self._drain_all()
            if self.ready is not None:
                log.error("worker_disconnected", endpoint=self.endpoint)
                self._lose(RequestError(ErrorCode.WORKER_LOST, "the worker's connection closed"))
        if connected and self.ready is None and self.state != "refused":
            self._send_hello()

    def _drain_all(self) -> None:
        """What a worker said before it died still counts."""
        while self.state != "closed" and self._has_input():
            self._drain()

    def _note(self, kind: str, **fields: object) -> None:
        """Count an anomaly; log the first of its kind on this link only."""
        self.anomalies[kind] += 1
        if self.anomalies[kind] == 1:
            log.warning("worker_anomaly", kind=kind, endpoint=self.endpoint, **fields)

    def note(self, kind: str) -> None:
        """Count an anomaly that the owner of the streams found (duplicate, gap)."""
        self._note(kind)


def use_curve(socket: zmq.Socket[bytes], folder: Path) -> None:
    """Encrypt and authenticate: our key pair and the worker's public key. Raises `ConfigError`."""
    server, own = folder / "worker.key", folder / "gateway.key_secret"
    for path in (server, own):
        if not path.is_file():
            raise ConfigError(f"curve_key_dir has no {path.name}")
    with contextlib.suppress(KeyError):
        server_public, _ = zmq.auth.load_certificate(server)
        own_public, own_secret = zmq.auth.load_certificate(own)
        if own_secret is None:
            raise ConfigError(f"{own.name} holds no secret key")
        socket.curve_serverkey = server_public
        socket.curve_publickey, socket.curve_secretkey = own_public, own_secret
