"""Owns the decode loop: commands in, steps launched and committed, events out. The decode thread.

host    plan t+1 │launch t+1│ commit t │ plan t+2 │launch t+2│ commit t+1 │
device  ▓▓▓▓▓ forward t ▓▓▓▓▓│▓▓▓▓▓ forward t+1 ▓▓▓▓▓│▓▓▓▓▓ forward t+2 ▓▓▓▓
copy                    └ D2H t ┘               └ D2H t+1 ┘
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty

import structlog

from shared.errors import ErrorCode
from shared.protocol import Fatal, FeatureFormat, ModelCard
from worker.loop.commands import Commands
from worker.loop.costs import Costs
from worker.loop.heartbeat import Heartbeat
from worker.loop.inbox import Command, Inbox, Outbox
from worker.loop.masks import MaskFiller
from worker.loop.metrics import WorkerMetrics
from worker.loop.page_export import PageExport
from worker.loop.page_intake import PageIntake
from worker.loop.recording import Recording
from worker.loop.reports import Reports
from worker.schedule.depth import DepthGovernor
from worker.schedule.kv_events import KvEvent
from worker.schedule.launch_timer import LaunchTimer
from worker.schedule.life import MaskLife
from worker.schedule.pipeline import InFlight, Pipeline
from worker.schedule.plan import Committed, StepPlan
from worker.schedule.scheduler import Scheduler
from worker.step.contract import OutOfDeviceMemory, Runner

log = structlog.get_logger()

MIN_WAIT_S = 20e-6  # a shorter wait means that the outputs had arrived already


class Engine:
    """The loop's state: a scheduler, a pipeline of slots, and whatever runs the steps.

    `on_beat(steps, expected_s)` is called with every heartbeat, `on_kv_events` with what the prefix cache, if it collects
    events, has remembered and forgotten. `wait_for_command` waits for a command for so many
    seconds at most; by default on the inbox.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        card: ModelCard,
        *,
        inbox: Inbox,
        outbox: Outbox,
        clock: Callable[[], float],
        epoch: int,
        depth: int = 2,
        on_beat: Callable[[int, float], None] | None = None,
        on_kv_events: Callable[[list[KvEvent]], None] | None = None,
        late_launch: bool = True,
        wait_for_command: Callable[[float], Command | None] | None = None,
        masks: MaskFiller | None = None,
        governor: DepthGovernor | None = None,
        costs: Costs | None = None,
        format: FeatureFormat | None = None,
        intake: PageIntake | None = None,
        export: PageExport | None = None,
    ) -> None:
        """`format`: of pictures that come encoded by other workers; None: none may. `intake` and `export`: of pages that are
        computed by other workers, and for them."""
        self.scheduler = scheduler
        self.runner = runner
        self.pipeline = Pipeline(runner.num_slots)
        self.depth = min(depth, runner.num_slots)
        self.metrics = WorkerMetrics(runner.graph_counts)
        self.stopping = False
        self._inbox = inbox
        self._outbox = outbox
        self._clock = clock
        self._epoch = epoch
        self._reports = Reports(outbox, clock, epoch, self.metrics, costs)
        self._recording = Recording(outbox, epoch)
        self._masks = masks or MaskFiller(inbox.put)
        self._intake, self._export = intake, export
        for pages in (intake, export):
            if pages is not None:
                pages.metrics = self.metrics
        self._commands = Commands(
            scheduler, self._reports, self._masks, self._recording, card, clock, epoch, format, intake, export
        )
        self._heartbeat = Heartbeat(scheduler, self.pipeline, self._reports, self._commands, clock, on_beat)
        self._timer = LaunchTimer() if late_launch else None
        self._governor = governor
        self._on_kv_events = on_kv_events
        self._wait_for_command = wait_for_command or self._wait_on_inbox
        self._waited_s = 0.0  # total time spent waiting for the device and the inbox
        self._had_work = False  # the loop has found work each time it looked since the last launch

    @property
    def is_draining(self) -> bool:
        """Whether the loop takes no new sequences and ends with the last one."""
        return self._commands.is_draining

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Tick until stopped or drained. A device fault ends every sequence with a typed error, then raises."""
        try:
            while not self.stopping:
                if not self.tick():
                    if self.is_draining and not self.scheduler.has_work:
                        self._heartbeat.send()  # the last word: it left, and was not lost
                        break
                    self._wait_and_take(self._heartbeat.next_s - self._clock())
        except Exception as error:
            self._give_up(error)
            raise
        finally:
            self._masks.close()

    def tick(self) -> bool:
        """One round; returns whether anything was launched or committed, or more is to be done at once.

        Take commands; commit the oldest step if its outputs are here already (a copied token is never held back to
        launch something); plan and launch the next step; and when the pipeline is as deep as it may be, or nothing can
        be launched, wait for the oldest and commit it. Blocking mode is the same at depth 1.
        """
        started_s = self._clock()
        waited_before_s = self._waited_s
        self.take_commands()
        self._commands.end_late(started_s)
        if started_s >= self._heartbeat.next_s:
            self._heartbeat.send()
        more_pages = self._intake is not None and self._intake.turn()
        oldest = self.pipeline.oldest
        committed = oldest is not None and self.runner.is_done(oldest.slot)
        if oldest is not None and committed:
            self._commit(oldest)
        if self._wait_and_take(self._early_by_s()):
            return True
        depth = self._depth_now()
        launched = self._plan_and_launch(depth)
        if len(self.pipeline) >= depth or not (launched or committed):
            oldest = self.pipeline.oldest
            if oldest is not None:
                self._commit(oldest)
                committed = True
        if launched:
            host_s = self._clock() - started_s - (self._waited_s - waited_before_s)
            self.metrics.host_seconds_total += host_s
            self.metrics.step_host.observe(host_s)
        if self._on_kv_events is not None:
            self._tell_kv_events(self._on_kv_events)
        return launched or committed or more_pages

    def take_commands(self) -> None:
        """Handle everything in the inbox."""
        inbox = self._inbox
        while not inbox.empty():
            self._commands.handle(inbox.get())

    def stop(self) -> None:
        """End the loop after the current tick. Called from another thread."""
        self.stopping = True

    def _tell_kv_events(self, tell: Callable[[list[KvEvent]], None]) -> None:
        cache = self.scheduler.cache
        if cache is not None and (events := cache.take_events()):
            tell(events)

    # ------------------------------------------------------------------ when to launch

    def _early_by_s(self) -> float:
        """For how long launching can wait for new requests because the device is busy; 0 if it must not wait.

        Above 0 only while a new request could join the step: a row is free, and none is queued.
        """
        newest, scheduler = self.pipeline.newest, self.scheduler
        if self._timer is None or newest is None or len(self.pipeline) != 1 or self.depth == 1:
            return 0.0
        if newest.plan.chunks or not scheduler.free_rows or scheduler.waiting.peek() is not None:
            return 0.0
        return self._timer.launch_at_s(len(newest.plan.decode)) - self._clock()

    def _depth_now(self) -> int:
        """Steps that may be in flight now; two at most while a new request could join, which would wait for a third."""
        if self._timer is not None and self.scheduler.free_rows:
            return min(self.depth, 2)
        return self.depth if self._governor is None else self._governor.depth

    def _wait_and_take(self, seconds: float) -> bool:
        """Sleep until a command comes, for `seconds` at most, and handle it; returns whether one came."""
        if seconds <= 0:
            return False
        before_s = self._clock()
        command = self._wait_for_command(seconds)
        self._waited_s += self._clock() - before_s
        if command is not None:
            self._commands.handle(command)
        return command is not None

    def _wait_on_inbox(self, timeout_s: float) -> Command | None:
        try:
            return self._inbox.get(timeout=timeout_s)
        except Empty:
            return None

    # ------------------------------------------------------------------ launching

    def _plan_and_launch(self, depth: int | None = None) -> bool:
        """Launch the next step if there is a free slot and work; returns whether a step was launched."""
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
        if self._recording.is_on:
            self._recording.on_host(f"plan and launch {plan.step}", before_s, after_s)
        return True

    def _launch(self, plan: StepPlan) -> None:
        """Forward now; sample unconstrained rows at once, constrained rows when their masks are known."""
        runner, pipeline = self.runner, self.pipeline
        if not len(pipeline):
            self.metrics.on_sync("depth" if self.depth == 1 else "behind" if self._had_work else "idle")
        step = pipeline.launch(plan, self._clock(), follows=self._had_work)
        self.metrics.depth = len(pipeline)
        self._heartbeat.on_launch(plan.expected_s)
        try:
            runner.launch_forward(step.slot, plan, self._heartbeat.on_progress)
        except OutOfDeviceMemory as error:
            self._shed(plan, error)
        if not plan.deferred:
            runner.launch_sampling(step.slot, plan, list(range(len(plan.samples))), masked=False)
        else:
            waiting = set(plan.deferred)
            free = [i for i in range(len(plan.samples)) if i not in waiting]
            if free:
                runner.launch_sampling(step.slot, plan, free, masked=False)
            self._commit_what_masks_need(step)
            self._fill_masks(step)
            runner.launch_sampling(step.slot, plan, plan.deferred, masked=True)
        runner.launch_copy(step.slot, plan)
        pipeline.on_sampled(step)

    def _commit_what_masks_need(self, step: InFlight) -> None:
        """The forward of `step` is running: commit what its constrained rows' grammars still wait for. A mask that was
        built ahead (worker.loop.masks) waits for nothing."""
        plan = step.plan
        if all(plan.samples[i].mask is MaskLife.READY for i in plan.deferred):
            return
        if self.pipeline.oldest is not step:
            self.metrics.on_sync("mask")
        while (oldest := self.pipeline.oldest) is not step:
            assert oldest is not None
            self._commit(oldest)

    def _fill_masks(self, step: InFlight) -> None:
        started_s = self._clock()
        for seq, text in self._masks.fill_deferred(self.runner.mask_rows(step.slot), step.plan):
            self._commands.fail_grammar(seq, text)
        self.metrics.paced_rows_total = self._masks.num_paced
        self.metrics.mask_seconds_total += self._clock() - started_s

    # ------------------------------------------------------------------ committing

    def _commit(self, step: InFlight) -> None:
        """Wait for the oldest step's outputs, accept them, and report them to gateways."""
        plan, waited_before_s = step.plan, self._waited_s
        early = self._commit_rows(step) if plan.chunks and plan.decode else None
        before_s = self._clock()
        result = self.runner.wait(step.slot, plan)
        now_s = self._clock()
        self._waited_s += now_s - before_s
        wait_s = self._waited_s - waited_before_s
        if self._timer is not None:
            waited = wait_s > MIN_WAIT_S
            self._timer.on_commit(now_s, len(plan.decode), is_decode=not plan.chunks, waited=waited)
        times = self.runner.device_times(step.slot)
        self.pipeline.commit(step)
        self._heartbeat.on_commit(now_s)
        first = 0 if early is None else len(plan.decode)
        due = self._export.due(plan) if self._export is not None else ()
        done = self.scheduler.commit(plan, result, now_s, busy_s=times.busy_s, first=first)
        if self._export is not None:
            self._export.send(due)
            self._export.forget_ended()
        self._reports.send_step(plan, done, result)
        for i in plan.deferred:
            seq = plan.samples[i]
            if seq.mask is MaskLife.AWAITED and seq.finish is None:
                self._masks.build_ahead(seq, self.runner.mask_rows(step.slot).shape[1])
        if self._recording.is_on:
            self._recording.on_host("wait", before_s, now_s)
            self._recording.on_host(f"commit {plan.step}", now_s, self._clock())
            self._recording.on_commit(step, now_s, times)
        num_tokens, num_zombies = len(done.token_ids), done.num_zombies
        if early is not None:
            num_tokens, num_zombies = num_tokens + len(early.token_ids), num_zombies + early.num_zombies
        self.metrics.on_commit(plan, num_tokens, num_zombies, times, wait_s)
        if step.follows:  # otherwise there was no work before it, so an idle device is no bubble
            self.metrics.on_bubble(times.idle_s)
            if self._governor is not None and self._governor.depth == self._depth_now():
                self._governor.on_commit(times.busy_s, times.idle_s, len(plan.samples), num_zombies)

    def _commit_rows(self, step: InFlight) -> Committed | None:
        """Accept and report the decode rows of a step whose chunks may still run, if their outputs come first."""
        before_s = self._clock()
        result = self.runner.wait_rows(step.slot, step.plan)
        if result is None:
            return None
        now_s = self._clock()
        self._waited_s += now_s - before_s
        early = self.scheduler.commit_rows(step.plan, result, now_s)
        self._reports.send_step(step.plan, early, result)
        return early

    # ------------------------------------------------------------------ failure

    def _shed(self, plan: StepPlan, error: OutOfDeviceMemory) -> None:
        """End the prompts of a step that found no device memory; the batch goes on, and their rows are zombies."""
        log.warning("out_of_memory", chunks=len(plan.chunks), detail=str(error)[:300])
        for chunk in plan.chunks:
            if chunk.seq.finish is None:
                text = "the device has no memory for this prompt now; try again, or with less of it"
                self.scheduler.fail(chunk.seq, ErrorCode.OUT_OF_MEMORY, text)
                self._reports.send_finish(chunk.seq)

    def _give_up(self, error: Exception) -> None:
        """The device is lost: send one typed terminal event for each sequence, then `Fatal`."""
        log.error("decode_loop_failed", error=type(error).__name__, detail=str(error)[:500])
        text = f"the device failed: {type(error).__name__}"
        for seq in self.scheduler.abandon(ErrorCode.DEVICE_ERROR, text):
            self._reports.send_finish(seq)
        self._outbox.broadcast(Fatal(self._epoch, ErrorCode.DEVICE_ERROR, type(error).__name__))
