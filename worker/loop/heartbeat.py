"""Owns the worker's signs of life: when they are sent, and how long the next may take to come. Decode thread.

A loop that hangs sends nothing. A loop that is slow announces how long its steps should take, and sends heartbeats from
inside them where it can.
"""

from __future__ import annotations

from collections.abc import Callable

from worker.loop.commands import Commands
from worker.loop.reports import Reports
from worker.schedule.pipeline import Pipeline
from worker.schedule.scheduler import Scheduler

BEAT_INTERVAL_S = 0.5
LONG_S = 1.0  # steps that should take longer are announced
SLACK = 2.0  # a step may take so many times its expected time before it counts as hung


class Heartbeat:
    """Sends heartbeats to gateways, and the same to the supervisor by `on_beat(steps, expected_s)`."""

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        reports: Reports,
        commands: Commands,
        clock: Callable[[], float],
        on_beat: Callable[[int, float], None] | None,
    ) -> None:
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._reports = reports
        self._commands = commands
        self._clock = clock
        self._on_beat = on_beat
        self._started_s = self.next_s = clock()
        self._last_commit_s = self._started_s

    def on_commit(self, now_s: float) -> None:
        """A step was committed: the device now runs the next one."""
        self._last_commit_s = now_s

    def on_launch(self, expected_s: float) -> None:
        """A step is about to be queued: announce it first if queueing it, or waiting for it, may take long."""
        if expected_s * SLACK > LONG_S:
            self.send()

    def on_progress(self) -> None:
        """Called from inside a step that runs while the host waits."""
        if self._clock() >= self.next_s:
            self.send()

    def send(self) -> None:
        """Send a heartbeat to gateways and the supervisor."""
        now_s = self._clock()
        self.next_s = now_s + BEAT_INTERVAL_S
        expected_s = self._expected_s(now_s)
        self._reports.send_beat(
            self._scheduler,
            draining=self._commands.is_draining,
            loop_s=now_s - self._started_s,
            expected_s=expected_s,
        )
        if self._on_beat is not None:
            self._on_beat(self._reports.metrics.steps_total, expected_s)

    def _expected_s(self, now_s: float) -> float:
        """How long it may be until the steps in flight are over; 0 when none is."""
        oldest = self._pipeline.oldest
        if oldest is None:
            return 0.0
        begun_s = max(oldest.launched_s, self._last_commit_s)
        return max(0.0, begun_s + SLACK * self._pipeline.expected_s - now_s)
