"""Owns what the decode thread does with each command of its inbox. Decode thread."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Cancel, Drain, Encode, FeatureFormat, ModelCard, Prefill, Submit, Trace
from worker.constraints.constraint import Constraint
from worker.loop.inbox import (
    Command,
    CompiledSubmit,
    LeaseEnded,
    MaskReady,
    PagesHere,
    PrefillEnded,
    Received,
)
from worker.loop.masks import MaskFiller
from worker.loop.page_export import PageExport
from worker.loop.page_intake import PageIntake
from worker.loop.recording import Recording
from worker.loop.reports import Reports
from worker.schedule.intake import build_sequence
from worker.schedule.refusal import Refusal
from worker.schedule.scheduler import Scheduler
from worker.schedule.sequence import Sequence

log = structlog.get_logger()


class Commands:
    """Submissions, cancellations, drains, recordings, masks and leases that ended."""

    def __init__(
        self,
        scheduler: Scheduler,
        reports: Reports,
        masks: MaskFiller,
        recording: Recording,
        card: ModelCard,
        clock: Callable[[], float],
        epoch: int,
        format: FeatureFormat | None = None,
        intake: PageIntake | None = None,
        export: PageExport | None = None,
    ) -> None:
        """`format`: of pictures that come encoded. `intake`: of pages that prefill workers compute; `export`: of those that
        this one computes for others, and then it takes no requests."""
        self._format = format
        self._intake = intake
        self._export = export
        self._scheduler = scheduler
        self._reports = reports
        self._masks = masks
        self._recording = recording
        self._card = card
        self._clock = clock
        self._epoch = epoch
        self.is_draining = False
        self._drain_until_s = float("inf")

    def handle(self, command: Command) -> None:
        """Carry out one command."""
        if isinstance(command, Received):
            self._on_message(command)
        elif isinstance(command, CompiledSubmit):
            self._submit(command.gateway, command.message, command.frames, command.constraint)
        elif isinstance(command, MaskReady):
            self._on_mask_ready(command)
        elif isinstance(command, LeaseEnded):
            left = self._scheduler.cancel_gateway(command.gateway)
            for seq in left:
                self._reports.count_finish(seq)  # its gateway is gone, so no message is sent
            if left:
                log.warning("gateway_left_sequences", number=len(left))
        elif isinstance(command, PagesHere | PrefillEnded) and self._intake is not None:
            self._intake.on_command(command)

    def _on_message(self, received: Received) -> None:
        gateway, message = received.gateway, received.message
        if isinstance(message, Submit):
            self._submit(gateway, message, received.frames)
        elif isinstance(message, Cancel):
            for sequence_id in message.sequence_ids:
                seq = self._scheduler.cancel(gateway, sequence_id, FinishReason.CANCELLED)
                if seq is not None:
                    self._reports.send_finish(seq)
        elif isinstance(message, Prefill):
            self._prefill(gateway, message)
        elif isinstance(message, Encode):
            text = "this worker encodes no pictures for others; start it with the role encode"
            self._reports.send_features_refusal(gateway, message.job_id, ErrorCode.UNSUPPORTED, text)
        elif isinstance(message, Trace):
            self._recording.begin(gateway, message.num_steps)
        elif isinstance(message, Drain):
            self.drain(message.deadline_s)

    def _submit(
        self,
        gateway: bytes,
        message: Submit,
        frames: list[bytes],
        compiled: Constraint | None = None,
        prefill: Prefill | None = None,
    ) -> None:
        now_s = self._clock()
        if (gateway, message.sequence_id) in self._scheduler.sequences:
            self._reports.metrics.duplicate_submits_total += (
                1  # a frame delivered twice: the sequence runs already
            )
            return
        try:
            if message.epoch != self._epoch:
                raise Refusal(
                    ErrorCode.WORKER_LOST, f"this worker's epoch is {self._epoch}, not {message.epoch}"
                )
            if self.is_draining:
                raise Refusal(ErrorCode.SHUTTING_DOWN, "the worker is draining")
            if self._export is not None and prefill is None:
                raise Refusal(
                    ErrorCode.UNSUPPORTED, "this worker only computes prompts for others (role prefill)"
                )
            seq = build_sequence(gateway, message, frames, self._card, now_s, compiled, self._format)
            self._scheduler.submit(seq)
        except Refusal as refusal:
            self._reports.send_refusal(gateway, message.sequence_id, refusal, len(self._scheduler.waiting))
            return
        if self._export is not None and prefill is not None:
            self._export.add(seq, prefill.first_page)
        elif self._intake is not None and message.prefill_at is not None:
            self._intake.begin(seq, message.prefill_at)

    def _prefill(self, gateway: bytes, message: Prefill) -> None:
        """A prompt for another worker: computed like any other, and one token behind it, which nobody reads."""
        asked = Submit(
            message.epoch,
            message.job_id,
            f"prefill-{message.job_id}",
            message.prompt,
            1,
            tenant=message.tenant,
            priority=message.priority,
            deadline_s=message.deadline_s,
        )
        if self._export is None:
            text = "this worker computes no prompts for others; start it with the role prefill"
            refusal = Refusal(ErrorCode.UNSUPPORTED, text)
            self._reports.send_refusal(gateway, message.job_id, refusal, len(self._scheduler.waiting))
            return
        self._submit(gateway, asked, [], prefill=message)

    def _on_mask_ready(self, ready: MaskReady) -> None:
        if ready.seq.finish is not None:
            return
        if ready.error:
            self.fail_grammar(ready.seq, ready.error)
        else:
            self._masks.accept(ready)

    def fail_grammar(self, seq: Sequence, text: str) -> None:
        """End a sequence whose grammar cannot say what may come next."""
        self._scheduler.fail(seq, ErrorCode.INVALID_GRAMMAR, f"the grammar failed: {text}")
        self._reports.send_finish(seq)

    # ------------------------------------------------------------------ draining

    def drain(self, deadline_s: float) -> None:
        """Refuse new sequences, and end running ones by `deadline_s` from now at the latest."""
        self._drain_until_s = min(self._drain_until_s, self._clock() + deadline_s)
        if not self.is_draining:
            self.is_draining = True
            log.info("draining", deadline_s=deadline_s, running=len(self._scheduler.running))

    def end_late(self, now_s: float) -> None:
        """End sequences whose own deadline, or the drain's, has passed."""
        for seq in self._scheduler.expire(now_s):
            self._reports.send_finish(seq)
        if now_s > self._drain_until_s:
            for seq in list(self._scheduler.sequences.values()):
                text = "the worker's drain deadline has passed"
                self._scheduler.fail(seq, ErrorCode.SHUTTING_DOWN, text)
                self._reports.send_finish(seq)
