"""Owns the decode loop: commands in, steps launched and committed, events out. The decode thread.

    host    plan t+1 │launch t+1│ commit t │ plan t+2 │launch t+2│ commit t+1 │
    device  ▓▓▓▓▓ forward t ▓▓▓▓▓│▓▓▓▓▓ forward t+1 ▓▓▓▓▓│▓▓▓▓▓ forward t+2 ▓▓▓▓
    copy                    └ D2H t ┘               └ D2H t+1 ┘

One tick: take commands; commit the oldest step if its outputs are here already (a copied token is never held
back to launch something); plan and launch the next step; and when the pipeline is as deep as it may be, or
nothing can be launched, wait for the oldest and commit it. Blocking mode is the same loop at depth 1.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue

import structlog

from shared.errors import ErrorCode, FinishReason
from shared.protocol import (
    Cancel,
    Drain,
    Fatal,
    FromGateway,
    ModelCard,
    Submit,
    Trace,
    TraceChunk,
)
from worker.constraints.constraint import Constraint
from worker.loop.masks import MaskFiller, MaskReady
from worker.loop.metrics import WorkerMetrics
from worker.loop.reports import Outbox, Reports
from worker.loop.trace import HOST, TraceRecorder
from worker.schedule.depth import DepthGovernor
from worker.schedule.intake import CompiledSubmit, build_sequence
from worker.schedule.launch_timer import LaunchTimer
from worker.schedule.pipeline import InFlight, Pipeline
from worker.schedule.plan import StepPlan
from worker.schedule.refusal import Refusal
from worker.schedule.scheduler import Scheduler
from worker.schedule.sequence import Sequence
from worker.step.contract import DeviceTimes, OutOfDeviceMemory, Runner

log = structlog.get_logger()

BEAT_INTERVAL_S = 0.5
MAX_TRACE_STEPS = 2000
MIN_WAIT_S = 20e-6  # a commit that took less found its outputs there: it did not wait for the device

Command = tuple[bytes, FromGateway | CompiledSubmit | MaskReady | None, list[bytes]]
"""(gateway, message, payload frames) from the I/O, compiler or mask threads. None: the gateway's lease ran out."""


class Engine:
    """The loop's state: a scheduler, a pipeline of slots, and whatever runs the steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        card: ModelCard,
        *,
        inbox: SimpleQueue[Command],
        outbox: Outbox,
        clock: Callable[[], float],
        epoch: int,
        depth: int = 2,
        on_beat: Callable[[int], None] | None = None,
        late_launch: bool = True,
        wait_for_command: Callable[[float], Command | None] | None = None,
        masks: MaskFiller | None = None,
        governor: DepthGovernor | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.card = card
        self.pipeline = Pipeline(runner.num_slots)
        self.depth = min(depth, runner.num_slots)
        self.metrics = WorkerMetrics()
        self.draining = False
        self.stopping = False
        self._inbox = inbox
        self._outbox = outbox
        self._clock = clock
        self._epoch = epoch
        self._reports = Reports(outbox, clock, epoch, self.metrics)
        self._on_beat = on_beat
        self._started_s = self._next_beat_s = clock()
        self._trace: tuple[bytes, TraceRecorder] | None = None
        self._timer = LaunchTimer() if late_launch else None
        self._governor = governor
        self._masks = masks or MaskFiller(lambda ready: inbox.put((ready.seq.gateway, ready, [])))
        self._wait_for_command = wait_for_command or self._wait_on_inbox
        self._drain_until_s = 0.0
        self._waited_s = 0.0
        self._had_work = False  # something could be launched whenever the loop last looked

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Tick until stopped or drained. A device fault ends every sequence with a typed error, then raises."""
        try:
            while not self.stopping:
                if not self.tick():
                    if self.draining and not self.scheduler.has_work:
                        break
                    self._idle()
        except Exception as error:
            self._fail_everything(error)
            raise
        finally:
            self._masks.close()

    def tick(self) -> bool:
        """One round; returns whether anything was launched or committed."""
        started_s = self._clock()
        waited_before_s = self._waited_s
        self.take_commands()
        for seq in self.scheduler.expire(started_s):
            self._reports.send_finish(seq)
        if started_s >= self._next_beat_s:
            self._beat(started_s)
        oldest = self.pipeline.oldest
        committed = oldest is not None and self.runner.is_done(oldest.slot)
        if oldest is not None and committed:
            self._commit(oldest)
        if self._is_early():
            return True
        depth = self._depth_now()
        launched = self._launch_next(depth)
        if len(self.pipeline) >= depth or not (launched or committed):
            oldest = self.pipeline.oldest
            if oldest is not None:
                self._commit(oldest)
                committed = True
        if launched:
            host_s = self._clock() - started_s - (self._waited_s - waited_before_s)
            self.metrics.host_seconds_total += host_s
            self.metrics.step_host.observe(host_s)
        return launched or committed

    def _is_early(self) -> bool:
        """Whether the device has enough to do that launching can wait for what may arrive; waits for it if so.

        Only while an arrival could join the step: a free row, and nobody queued already.
        """
        newest, scheduler = self.pipeline.newest, self.scheduler
        if self._timer is None or newest is None or len(self.pipeline) != 1 or self.depth == 1:
            return False
        if newest.plan.chunks or len(scheduler.waiting) or not scheduler.free_rows:
            return False
        before_s = self._clock()
        left_s = self._timer.launch_at_s(len(newest.plan.decode)) - before_s
        if left_s <= 0:
            return False
        command = self._wait_for_command(left_s)
        self._waited_s += self._clock() - before_s
        if command is None:
            return False
        self._on_command(*command)
        return True

    def _depth_now(self) -> int:
        """Steps that may be in flight now. While an arrival could join, two at most: it would wait for a third."""
        if self._timer is not None and self.scheduler.free_rows:
            return min(self.depth, 2)
        return self.depth if self._governor is None else self._governor.depth

    def _launch_next(self, depth: int | None = None) -> bool:
        if not self.pipeline.can_launch(depth or self.depth):
            return False
        before_s = self._clock()
        plan = self.scheduler.plan(before_s)
        if plan is None:
            self._had_work = False
            return False
        self._launch(plan)
        self._had_work = True
        after_s = self._clock()
        if self._timer is not None and not plan.chunks and not plan.deferred:
            self._timer.on_launch(after_s - before_s)
        if self._trace is not None:
            self._trace[1].span(HOST, f"plan and launch {plan.step}", before_s, after_s)
        return True

    def _launch(self, plan: StepPlan) -> None:
        """Forward now; sample unconstrained rows at once, constrained rows when their masks are known."""
        runner, pipeline = self.runner, self.pipeline
        if not len(pipeline):
            self._count_sync("depth" if self.depth == 1 else "idle" if not self._had_work else "behind")
        step = pipeline.launch(plan, self._clock(), follows=self._had_work)
        self.metrics.depth = len(pipeline)
        try:
            runner.launch_forward(step.slot, plan)
        except OutOfDeviceMemory as error:
            self._shed(plan, error)
        if not plan.deferred:
            runner.launch_sampling(step.slot, plan, list(range(len(plan.samples))), masked=False)
        else:
            waiting = set(plan.deferred)
            free = [i for i in range(len(plan.samples)) if i not in waiting]
            if free:
                runner.launch_sampling(step.slot, plan, free, masked=False)
            self._sample_deferred(step)
        runner.launch_copy(step.slot, plan)
        pipeline.on_sampled(step)

    def _shed(self, plan: StepPlan, error: OutOfDeviceMemory) -> None:
        """The prompts of this step found no memory: they end, and the batch goes on. Their rows are zombies."""
        log.warning("out_of_memory", chunks=len(plan.chunks), detail=str(error)[:300])
        for chunk in plan.chunks:
            if chunk.seq.finish is None:
                text = "the device has no memory for this prompt now; try again, or with less of it"
                self.scheduler.fail(chunk.seq, ErrorCode.OUT_OF_MEMORY, text)
                self._reports.send_finish(chunk.seq)

    def _count_sync(self, reason: str) -> None:
        """A step the device was, or could have been, kept waiting for: `depth` (blocking mode), `idle` (no work
        before it), `behind` (the host was late), `mask` (constrained rows had to see their last token)."""
        counts = self.metrics.sync_steps_total
        counts[reason] = counts.get(reason, 0) + 1

    def _sample_deferred(self, step: InFlight) -> None:
        """The forward of `step` is running: commit what its constrained rows' grammars still wait for, then
        build their masks and sample them."""
        plan = step.plan
        # A mask built ahead (worker.loop.masks) waits for nothing.
        if any(plan.samples[i].ready_mask is None for i in plan.deferred):
            if self.pipeline.oldest is not step:
                self._count_sync("mask")
            while (oldest := self.pipeline.oldest) is not step:
                assert oldest is not None
                self._commit(oldest)
        started_s = self._clock()
        masks = self.runner.mask_rows(step.slot)
        rows: list[tuple[int, Sequence]] = []
        for i in plan.deferred:
            seq = plan.samples[i]
            if seq.finish is not None or seq.constraint is None:
                masks[i] = -1  # a zombie: whatever it samples is skipped
            else:
                rows.append((i, seq))
        for i, text in self._masks.fill(masks, rows):
            masks[i] = -1  # from here on a zombie
            self._fail_grammar(plan.samples[i], text)
        self.metrics.paced_rows_total = self._masks.num_paced
        self.metrics.mask_seconds_total += self._clock() - started_s
        self.runner.launch_sampling(step.slot, plan, plan.deferred, masked=True)

    def _fail_grammar(self, seq: Sequence, text: str) -> None:
        self.scheduler.fail(seq, ErrorCode.INVALID_GRAMMAR, f"the grammar failed: {text}")
        self._reports.send_finish(seq)

    def _on_mask_ready(self, ready: MaskReady) -> None:
        if ready.seq.finish is not None:
            return
        if ready.error:
            self._fail_grammar(ready.seq, ready.error)
        else:
            self._masks.accept(ready)

    def _commit(self, step: InFlight) -> None:
        before_s = self._clock()
        result = self.runner.wait(step.slot, step.plan)
        now_s = self._clock()
        self._waited_s += now_s - before_s
        if self._timer is not None:
            plan = step.plan
            waited = now_s - before_s > MIN_WAIT_S
            self._timer.on_commit(now_s, len(plan.decode), is_decode=not plan.chunks, waited=waited)
        times = self.runner.device_times(step.slot)
        self.pipeline.commit(step)
        done = self.scheduler.commit(step.plan, result, now_s)
        self._reports.send_step(step.plan, done, result)
        for i in step.plan.deferred:
            seq = step.plan.samples[i]
            if seq.awaits_mask and seq.finish is None:
                self._masks.build_ahead(seq, self.runner.mask_rows(step.slot).shape[1])
        if self._trace is not None:
            self._record_commit(*self._trace, step, before_s, now_s, times)
        self.metrics.on_commit(step.plan, len(done.token_ids), done.num_zombies, times, now_s - before_s)
        if step.follows:  # else there was no work before it, and an idle device is no bubble
            self.metrics.on_bubble(times.idle_s)
            if self._governor is not None and self._governor.depth == self._depth_now():
                self._governor.on_commit(times.busy_s, times.idle_s, len(step.plan.samples), done.num_zombies)

    def _record_commit(
        self,
        gateway: bytes,
        trace: TraceRecorder,
        step: InFlight,
        before_s: float,
        read_s: float,
        times: DeviceTimes,
    ) -> None:
        trace.span(HOST, "wait", before_s, read_s)
        trace.span(HOST, f"commit {step.plan.step}", read_s, self._clock())
        if trace.on_commit(step, busy_s=times.busy_s, idle_s=times.idle_s, read_s=read_s):
            self._outbox.send(gateway, TraceChunk(self._epoch, step.plan.step), [trace.to_json()])
            self._trace = None

    # ------------------------------------------------------------------ commands

    def take_commands(self) -> None:
        """Handle everything in the inbox."""
        inbox = self._inbox
        while not inbox.empty():
            gateway, message, frames = inbox.get()
            self._on_command(gateway, message, frames)

    def _on_command(
        self, gateway: bytes, message: FromGateway | CompiledSubmit | MaskReady | None, frames: list[bytes]
    ) -> None:
        if isinstance(message, Submit):
            self._on_submit(gateway, message, frames)
        elif isinstance(message, CompiledSubmit):
            self._on_submit(gateway, message.message, frames, message.constraint)
        elif isinstance(message, Cancel):
            for sequence_id in message.sequence_ids:
                seq = self.scheduler.cancel(gateway, sequence_id, FinishReason.CANCELLED)
                if seq is not None:
                    self._reports.send_finish(seq)
        elif isinstance(message, Trace):
            self._trace = (gateway, TraceRecorder(min(max(message.num_steps, 1), MAX_TRACE_STEPS)))
        elif isinstance(message, Drain):
            self.drain(message.deadline_s)
        elif isinstance(message, MaskReady):
            self._on_mask_ready(message)
        elif message is None:
            for seq in self.scheduler.cancel_gateway(gateway):
                self._reports.count_finish(seq)  # nobody is left to tell

    def _on_submit(
        self, gateway: bytes, message: Submit, frames: list[bytes], compiled: Constraint | None = None
    ) -> None:
        now_s = self._clock()
        if (gateway, message.sequence_id) in self.scheduler.sequences:
            self.metrics.duplicate_submits_total += 1  # a frame delivered twice: its sequence runs already
            return
        try:
            if message.epoch != self._epoch:
                raise Refusal(
                    ErrorCode.WORKER_LOST, f"this worker's epoch is {self._epoch}, not {message.epoch}"
                )
            if self.draining:
                raise Refusal(ErrorCode.SHUTTING_DOWN, "the worker is draining")
            seq = build_sequence(gateway, message, frames, self.card, now_s, compiled)
            self.scheduler.submit(seq)
        except Refusal as refusal:
            self._reports.send_refusal(gateway, message.sequence_id, refusal, len(self.scheduler.waiting))

    def drain(self, deadline_s: float) -> None:
        """Refuse new sequences, end running ones by `deadline_s` from now at the latest, then stop."""
        self._drain_until_s = min(self._drain_until_s or 1e18, self._clock() + deadline_s)
        if self.draining:
            return
        self.draining = True
        log.info("draining", deadline_s=deadline_s, running=len(self.scheduler.running))

    def _beat(self, now_s: float) -> None:
        """Sent by this thread and no other: a loop that hangs falls silent."""
        self._next_beat_s = now_s + BEAT_INTERVAL_S
        if self.draining and now_s > self._drain_until_s:
            for seq in list(self.scheduler.sequences.values()):
                self.scheduler.fail(seq, ErrorCode.SHUTTING_DOWN, "the worker's drain deadline has passed")
                self._reports.send_finish(seq)
        self._reports.send_beat(
            self.scheduler, draining=self.draining, loop_s=self._clock() - self._started_s
        )
        if self._on_beat is not None:
            self._on_beat(self.metrics.steps_total)

    def _idle(self) -> None:
        """Nothing to run: sleep until a command or the next heartbeat."""
        timeout_s = self._next_beat_s - self._clock()
        command = self._wait_for_command(timeout_s) if timeout_s > 0 else None
        if command is not None:
            self._on_command(*command)

    def _wait_on_inbox(self, timeout_s: float) -> Command | None:
        try:
            return self._inbox.get(timeout=timeout_s)
        except Empty:
            return None

    def stop(self) -> None:
        """End the loop after the current tick. Called from another thread."""
        self.stopping = True

    def _fail_everything(self, error: Exception) -> None:
        """The device is lost: one typed terminal event for each sequence, then a last word."""
        log.error("decode_loop_failed", error=type(error).__name__, detail=str(error)[:500])
        for seq in list(self.scheduler.sequences.values()):
            seq.finish = FinishReason.ERROR
            seq.error = (ErrorCode.DEVICE_ERROR, f"the device failed: {type(error).__name__}")
            self._reports.send_finish(seq)
        self._outbox.broadcast(Fatal(self._epoch, ErrorCode.DEVICE_ERROR, f"{type(error).__name__}"))
