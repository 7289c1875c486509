"""Owns the conversation of this worker with one prefill worker: hello, lease, prompts asked for, what comes. Thread worker-pages.

It knows no socket: `worker.wire.prefill_client` moves the frames, and tells the time. To a prefill worker whoever asks is what
a gateway is to any worker: it has a lease, and what it asked for ends with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

import structlog

from shared import protocol as wire
from shared.errors import ErrorCode
from worker.loop.inbox import Command, PagesHere, PrefillEnded, PrefillJob

log = structlog.get_logger()

HELLO_S: Final = 0.25
REFUSED_HELLO_S: Final = 5.0
PING_S: Final = 1.0
LEASE_S: Final = 5.0
CONNECT_S: Final = 1.0  # so long a prompt waits for a peer of which nothing has been heard
MOST_EXPECTED_S: Final = 600.0  # the longest silence that a peer may announce
QUIET_S: Final = 600.0  # a peer that nobody has asked for so long is left

Data = bytes | memoryview


class PeerState(Enum):
    """The states of a peer."""

    NEW = "new"  # nothing was heard yet: prompts wait a moment
    DOWN = "down"  # it was lost, or never came: prompts are turned away at once, until it answers
    READY = "ready"
    REFUSED = "refused"  # its pages, or its version, do not fit


class PrefillPeer:
    """One endpoint. `send` posts frames, False if it cannot now; `tell` reaches the decode thread."""

    def __init__(
        self,
        endpoint: str,
        format: wire.PageFormat,
        name: str,
        send: Callable[[list[bytes]], bool],
        tell: Callable[[Command], None],
        now_s: float,
    ) -> None:
        self.endpoint = endpoint
        self.state = PeerState.NEW
        self.asked_s = now_s  # when it was last asked for anything
        self._format = format
        self._name = name
        self._send = send
        self._tell = tell
        self._made_s = now_s
        self._epoch = -1
        self._hello_s = -HELLO_S
        self._ping_s = now_s
        self._heard_s = now_s
        self._patience_s = 0.0
        self._timeout_s = 0.0
        self._jobs: dict[int, PrefillJob] = {}
        self._orphans: tuple[int, list[int]] = (-1, [])  # epoch, and what it may still compute for nobody
        self._refusal = ""

    @property
    def num_jobs(self) -> int:
        """Prompts that it computes, or that wait for it to answer."""
        return len(self._jobs)

    # ------------------------------------------------------------------ told by the decode thread

    def ask(self, job: PrefillJob, now_s: float) -> None:
        """Have a prompt computed; a peer that is not there ends it at once."""
        self.asked_s = now_s
        if self.state is PeerState.REFUSED:
            self._tell(PrefillEnded(job.job_id, "mismatched", self._refusal))
            return
        if self.state is PeerState.DOWN:
            self._tell(PrefillEnded(job.job_id, "lost", f"{self.endpoint} does not answer"))
            return
        self._jobs[job.job_id] = job
        if self.state is PeerState.READY:
            self._post(job)

    def cancel(self, job_id: int) -> None:
        """Nobody wants a prompt's pages any more."""
        if self._jobs.pop(job_id, None) is not None and self.state is PeerState.READY:
            self._send([wire.encode(wire.Cancel(self._epoch, [job_id]))])

    def _post(self, job: PrefillJob) -> None:
        message = wire.Prefill(
            self._epoch, job.job_id, job.prompt, job.first_page, job.tenant, job.priority, job.wait_s
        )
        if not self._send([wire.encode(message)]):
            self._end(job.job_id, "lost", "it takes no messages")

    # ------------------------------------------------------------------ told by the socket and the clock

    def on_frames(self, frames: Sequence[Data], now_s: float) -> None:
        """One message with its payload. What is no message, or another epoch's, is passed over."""
        try:
            message = wire.decode_from_worker(frames[0])
        except (*wire.NO_MESSAGE, IndexError):
            return
        if isinstance(message, wire.Ready):
            self._on_ready(message, now_s)
            return
        if isinstance(message, wire.Fatal) and message.code is ErrorCode.VERSION_SKEW:
            self._refuse(message.message)
            return
        if self.state is not PeerState.READY:
            return
        if isinstance(message, wire.TraceChunk) or message.epoch != self._epoch:
            return
        self._heard_s = now_s
        if isinstance(message, wire.Pages):
            self._on_pages(message, frames[1:])
        elif isinstance(message, wire.Beat):
            expected_s = message.expected_s if 0 <= message.expected_s <= MOST_EXPECTED_S else 0.0
            self._patience_s = self._timeout_s + expected_s
        elif isinstance(message, wire.StepOutputs):
            for finish in message.finishes:
                if finish.code is None and finish.reason.value in ("length", "stop"):
                    self._end(finish.sequence_id, "done")
                else:
                    self._end(finish.sequence_id, "failed", finish.message or finish.reason.value)
        elif isinstance(message, wire.Rejected):
            self._end(message.sequence_id, "refused", message.message)
        elif isinstance(message, wire.Fatal):
            self.on_lost(f"it ended: {message.message}")

    def on_lost(self, why: str) -> None:
        """The connection is gone, or the peer says nothing any more: what it was asked for is computed here."""
        if self.state is PeerState.READY:
            log.warning("prefill_worker_lost", endpoint=self.endpoint, why=why)
        if self.state is not PeerState.REFUSED:
            self.state = PeerState.DOWN
        if self._epoch >= 0:
            self._orphans = self._epoch, list(self._jobs)
        self._epoch = -1
        self._hello_s = -HELLO_S
        for job_id in list(self._jobs):
            self._end(job_id, "lost", why)

    def on_time(self, now_s: float) -> None:
        """Hello until it answers, then pings; silence beyond what it announced is a loss."""
        if self.state is PeerState.READY:
            if now_s - self._heard_s >= self._patience_s:
                self.on_lost(f"it made no progress for {now_s - self._heard_s:.1f} s")
            elif now_s - self._ping_s >= PING_S:
                self._ping_s = now_s
                self._send([wire.encode(wire.Ping(self._epoch, now_s))])
            return
        if self.state is PeerState.NEW and now_s - self._made_s >= CONNECT_S:
            self.on_lost("nothing was heard of it")
        every_s = REFUSED_HELLO_S if self.state is PeerState.REFUSED else HELLO_S
        if now_s - self._hello_s >= every_s:
            self._hello_s = now_s
            hello = wire.Hello(wire.PROTOCOL_VERSION, wire.schema_hash(), self._name, LEASE_S)
            self._send([wire.encode(hello)])

    # ------------------------------------------------------------------ messages

    def _on_ready(self, ready: wire.Ready, now_s: float) -> None:
        if self.state is PeerState.READY and ready.epoch == self._epoch:
            return  # an answer to a repeated hello
        if self.state is PeerState.READY:
            self.on_lost("it started again")
        if fault := misfit(self._format, ready):
            self._refuse(fault)
            return
        self.state, self._epoch, self._refusal = PeerState.READY, ready.epoch, ""
        self._timeout_s = self._patience_s = ready.limits.progress_timeout_s
        self._heard_s = self._ping_s = now_s
        log.info("prefill_worker_ready", endpoint=self.endpoint, epoch=ready.epoch)
        epoch, orphans = self._orphans
        if epoch == ready.epoch and orphans:  # the same process again: it was silent, not dead
            self._send([wire.encode(wire.Cancel(epoch, orphans))])
        self._orphans = -1, []
        for job in list(self._jobs.values()):
            self._post(job)

    def _refuse(self, fault: str) -> None:
        if fault != self._refusal:
            log.error("prefill_mismatched", endpoint=self.endpoint, reason=fault)
        self.state, self._refusal = PeerState.REFUSED, fault
        for job_id in list(self._jobs):
            self._end(job_id, "mismatched", fault)

    def _on_pages(self, message: wire.Pages, payloads: Sequence[Data]) -> None:
        if message.job_id not in self._jobs:
            return  # cancelled, and this crossed it
        if len(payloads) != 1 or zlib.crc32(payloads[0]) != message.checksum:
            self.cancel(message.job_id)
            self._tell(PrefillEnded(message.job_id, "malformed", "a frame of pages is missing or changed"))
            return
        self._tell(PagesHere(message.job_id, message.first, message.keys, payloads[0]))

    def _end(self, job_id: int, outcome: str, detail: str = "") -> None:
        if self._jobs.pop(job_id, None) is not None:
            self._tell(PrefillEnded(job_id, outcome, detail))


def misfit(mine: wire.PageFormat, ready: wire.Ready) -> str:
    """Why a worker's pages cannot be taken in; empty if they can."""
    if ready.protocol_version != wire.PROTOCOL_VERSION or ready.schema_hash != wire.schema_hash():
        return (
            f"it speaks protocol {ready.protocol_version} ({ready.schema_hash}): run the same version of both"
        )
    theirs = ready.pages
    if ready.role != "prefill" or theirs is None:
        return f"its role is {ready.role}; a safe value is prefill"
    names = {"dtype": "kv_dtype", "weights": "model, dtype, quantize, context and activations"}
    differing = [
        name for name in wire.PageFormat.__struct_fields__ if getattr(mine, name) != getattr(theirs, name)
    ]
    if not differing:
        return ""
    first = differing[0]
    values = f"{getattr(theirs, first)} there and {getattr(mine, first)} here"
    return f"its pages differ in {first} ({values}): the same {names.get(first, first)} is needed at both"
