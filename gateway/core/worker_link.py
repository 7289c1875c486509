"""Owns the conversation with one worker: hello, epochs, heartbeats, its messages' meaning. Runs on the gateway's loop.

`gateway.core.worker_socket` moves the frames; `gateway.decisions.link_state` keeps the link's state.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

import structlog
import zmq

from gateway.core.worker_socket import WorkerSocket
from gateway.decisions.link_state import LinkLife, LinkState
from gateway.faults import fault_fields
from gateway.generation import RequestError
from shared import protocol as wire
from shared.errors import ErrorCode

_TICK_S: Final = 0.25
_ALMOST_S: Final = 1.0  # a supervisor may end a silent worker this much before the gateway gives it up
_LEASE_S: Final = 5.0

log = structlog.get_logger(__name__)


class WorkerEvents(Protocol):
    """Hears what a worker says, in order, on the loop."""

    def on_ready(self, link: WorkerLink, tokenizer_json: bytes, chat_template: bytes) -> None:
        """A worker (or a new epoch of it) serves `link.ready`."""

    def on_outputs(self, link: WorkerLink, outputs: wire.StepOutputs) -> None:
        """One step's tokens."""

    def on_rejected(self, link: WorkerLink, rejected: wire.Rejected) -> None:
        """A submit that never became a sequence."""

    def on_features(self, link: WorkerLink, features: wire.Features, payloads: list[bytes]) -> None:
        """A picture's features, or why there are none."""

    def on_beat(self, link: WorkerLink, beat: wire.Beat) -> None:
        """The decode thread made progress."""

    def on_lost(self, link: WorkerLink, error: RequestError) -> None:
        """Everything in flight on this link is lost. The link goes on trying to reach a worker."""

    def on_recording(self, link: WorkerLink, recording: bytes) -> None:
        """A recording that was asked for arrived."""


class WorkerLink:
    """One endpoint. `ready` is set while a worker there serves and makes progress."""

    def __init__(
        self,
        endpoint: str,
        events: WorkerEvents,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        gateway_id: str,
        curve_key_dir: str | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self.anomalies: Counter[str] = Counter()
        self.was_silent = False  # the worker last lost fell silent (it hung or was stopped) and did not crash
        self.was_leaving = False  # the worker last lost had said that it drains: it was asked to go
        self._events = events
        self._gateway_id = gateway_id
        self._now = now
        self._life = LinkLife()
        self._socket = WorkerSocket(endpoint, self, context, curve_key_dir=curve_key_dir)
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ life

    def open(self) -> None:
        """Connect and start timers; call once, on the running loop."""
        self._socket.open()
        self._tick()

    def close(self) -> None:
        """Close the link: no more events. Idempotent."""
        if self._life.state is LinkState.CLOSED or self._timer is None:
            return
        self._life.close()
        self._timer.cancel()
        self._socket.close()

    @property
    def ready(self) -> wire.Ready | None:
        """What the serving worker announced; None when none serves."""
        return self._life.ready

    @property
    def beat(self) -> wire.Beat | None:
        """The serving worker's last heartbeat."""
        return self._life.beat

    @property
    def epoch(self) -> int:
        """The serving worker's epoch; −1 when none serves."""
        return self._life.epoch

    @property
    def lost_epoch(self) -> int:
        """The epoch of the worker last lost; −1 before any was."""
        return self._life.lost_epoch

    @property
    def refusal(self) -> str:
        """Why this link cannot work with the worker it found, if so."""
        return self._life.refusal

    # ------------------------------------------------------------ sending

    def submit(self, submit: wire.Submit, payloads: list[bytes]) -> None:
        """Send one request. Raises `RequestError` WORKER_LOST or QUEUE_FULL; never blocks."""
        if self.ready is None:
            raise RequestError(ErrorCode.WORKER_LOST, "the worker went away")
        self._socket.send([wire.encode(submit), *payloads])

    def encode(self, encode: wire.Encode, payloads: list[bytes]) -> None:
        """Ask for a picture's features. Raises `RequestError` WORKER_LOST or QUEUE_FULL; never blocks."""
        if self.ready is None:
            raise RequestError(ErrorCode.WORKER_LOST, "the worker went away")
        self._socket.send([wire.encode(encode), *payloads])

    def cancel(self, sequence_ids: list[int]) -> None:
        """Tell the worker to stop sequences. Best effort: an unreachable worker's lease runs out by itself."""
        if self.ready is None or not sequence_ids:
            return
        try:
            self._socket.send([wire.encode(wire.Cancel(self.epoch, sequence_ids))])
        except RequestError:
            self.note("cancel_not_sent")

    def record(self, num_steps: int) -> None:
        """Ask for a recording of the next steps. Raises `RequestError`."""
        if self.ready is None:
            raise RequestError(ErrorCode.LOADING, "no worker serves")
        self._socket.send([wire.encode(wire.Trace(num_steps))])

    def _send_hello(self) -> None:
        self._life.on_hello(self._now())
        hello = wire.Hello(wire.PROTOCOL_VERSION, wire.schema_hash(), self._gateway_id, _LEASE_S)
        self._socket.send_quietly(wire.encode(hello))

    # ------------------------------------------------------------ told by the socket

    def on_frames(self, frames: list[bytes]) -> None:
        """See `SocketEvents`."""
        if len(frames[0]) > wire.MAX_MESSAGE_BYTES:
            self.note("oversized")
            return
        message = wire.decode_from_worker(frames[0])
        if isinstance(message, wire.StepOutputs):
            if message.epoch != self.epoch:
                self.note("stale_epoch")
                return
            self._life.on_progress(self._now())
            self._events.on_outputs(self, message)
        elif isinstance(message, wire.Beat):
            self._on_beat(message)
        elif isinstance(message, wire.Ready):
            self._on_ready(message, frames)
        elif isinstance(message, wire.Rejected):
            if message.epoch != self.epoch:
                self.note("stale_epoch")
                return
            self._events.on_rejected(self, message)
        elif isinstance(message, wire.Features):
            if message.epoch != self.epoch:
                self.note("stale_epoch")
                return
            self._life.on_progress(self._now())
            self._events.on_features(self, message, frames[1:])
        elif isinstance(message, wire.Fatal):
            self._on_fatal(message)
        elif isinstance(message, wire.Pages):
            self.note("pages_for_a_gateway")
        else:
            self._events.on_recording(self, frames[1] if len(frames) > 1 else b"")

    def on_connected(self) -> None:
        """See `SocketEvents`."""
        if self._life.state is LinkState.CONNECTING:
            self._send_hello()

    def on_disconnected(self) -> None:
        """See `SocketEvents`: what a worker said before it died still counts."""
        if self.ready is not None:
            self._socket.drain_all()
        if self.ready is not None:
            if self._is_leaving:
                log.info("worker_left", endpoint=self.endpoint)
            else:
                log.error("worker_disconnected", endpoint=self.endpoint)
            self._lose(RequestError(ErrorCode.WORKER_LOST, "the worker's connection closed"))

    def note(self, kind: str, **fields: object) -> None:
        """Count an anomaly; log the first of its kind on this link only."""
        self.anomalies[kind] += 1
        if self.anomalies[kind] == 1:
            log.warning("worker_anomaly", kind=kind, endpoint=self.endpoint, **fields)

    # ------------------------------------------------------------ messages

    def _on_beat(self, beat: wire.Beat) -> None:
        if beat.epoch != self.epoch:
            self.note("stale_epoch")
            if self.ready is None:
                self._life.ask_soon()
            else:
                self._send_hello()  # perhaps from a restarted worker
            return
        self._life.on_beat(beat, self._now())
        self._events.on_beat(self, beat)

    def _on_ready(self, ready: wire.Ready, frames: list[bytes]) -> None:
        if ready.protocol_version != wire.PROTOCOL_VERSION or ready.schema_hash != wire.schema_hash():
            self._refuse(
                f"worker speaks protocol {ready.protocol_version} ({ready.schema_hash}), this gateway "
                f"{wire.PROTOCOL_VERSION} ({wire.schema_hash()}); install the same version on both sides"
            )
            return
        if ready.epoch == self.epoch:
            self._life.on_progress(self._now())
            return  # an answer to a repeated hello
        if self._life.state is LinkState.REFUSED and ready.epoch == self._life.refused_epoch:
            return  # a repeat of an announcement that was handled already
        if self.ready is not None and ready.epoch == self.lost_epoch:
            self.note("stale_epoch")  # a late message of a dead worker
            return
        if len(frames) < 3:
            self.note("malformed", reason="Ready without its two payload frames")
            return
        if self.ready is not None:
            self._lose(RequestError(ErrorCode.WORKER_LOST, "the worker restarted"))
        self._life.on_ready(ready, self._now())
        log.info(
            "worker_ready",
            endpoint=self.endpoint,
            epoch=ready.epoch,
            model=ready.model.model_id,
            role=ready.role,
        )
        self._events.on_ready(self, frames[1], frames[2])

    def _on_fatal(self, fatal: wire.Fatal) -> None:
        if fatal.code is ErrorCode.VERSION_SKEW:
            self._refuse(fatal.message)
            return
        if self.ready is None or fatal.epoch != self.epoch:
            self.note("stale_epoch")
            return
        log.error("worker_fatal", endpoint=self.endpoint, code=fatal.code.value)
        self._lose(RequestError(fatal.code, fatal.message or "the worker ended"))

    def disown(self, message: str) -> None:
        """Refuse a worker for what its `Ready` says (an unusable tokenizer); other workers are unaffected."""
        self._refuse(message)

    # ------------------------------------------------------------ moves

    def _refuse(self, message: str) -> None:
        was_ready = self.ready is not None
        if self.refusal != message:
            log.error("worker_refused", endpoint=self.endpoint, reason=message)
        self._life.refuse(message)
        if was_ready:
            self._events.on_lost(self, RequestError(ErrorCode.VERSION_SKEW, message))

    @property
    def _is_leaving(self) -> bool:
        return self.beat is not None and self.beat.draining

    def _lose(self, error: RequestError) -> None:
        """Handle the loss of the serving worker; call only while one serves."""
        self.was_silent = self._life.silent_s(self._now() + _ALMOST_S) > 0
        self.was_leaving = self._is_leaving
        self._life.on_lost()
        self._events.on_lost(self, error)

    def _tick(self) -> None:
        """Hello until ready, then pings; a decode thread silent for too long is a lost worker."""
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        try:
            now_s = self._now()
            if self._life.hello_due(now_s):
                self._send_hello()
            elif self._life.silent_s(now_s):
                self._socket.drain()  # read what has arrived before judging silence: this loop may be late
                silent_s = self._life.silent_s(self._now())
                if silent_s:
                    log.error("worker_silent", endpoint=self.endpoint, silent_s=round(silent_s, 1))
                    message = f"the worker made no progress for {silent_s:.1f} s"
                    self._lose(RequestError(ErrorCode.WORKER_LOST, message))
            elif self._life.ping_due(now_s):
                self._life.on_ping(now_s)
                self._socket.send_quietly(wire.encode(wire.Ping(self.epoch, now_s)))
        except Exception as fault:  # an error in one tick must not stop the timer
            self.note("failed_tick", **fault_fields(fault))
