"""Owns a runner that keeps the device's and the host's time of each step, and replays a step's graph alone. Main thread."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from worker.schedule.plan import StepPlan, StepResult
from worker.step.contract import DeviceTimes
from worker.step.decode_graphs import Flavour
from worker.step.torch_runner import TorchRunner


@dataclass(frozen=True, slots=True)
class StepTime:
    """One committed step as its device events and the host's clock saw it."""

    committed_s: float
    busy_s: float
    idle_s: float
    num_rows: int
    is_decode: bool


REPLAYS = 60


class TimedRunner(TorchRunner):
    """A TorchRunner that keeps the times of every committed step."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        self.times: list[StepTime] = []
        self._plan: StepPlan | None = None

    def wait(self, slot_number: int, plan: StepPlan) -> StepResult:
        """As the runner's own."""
        self._plan = plan
        return super().wait(slot_number, plan)

    def device_times(self, slot_number: int) -> DeviceTimes:
        """As the runner's own; called once a commit."""
        measured = super().device_times(slot_number)
        busy_s, idle_s = measured.busy_s, measured.idle_s
        plan = self._plan
        assert plan is not None
        self.times.append(StepTime(time.perf_counter(), busy_s, idle_s, len(plan.decode), not plan.chunks))
        return measured

    def time_replays(self, num_rows: int) -> float:
        """Seconds of one replay of the text graph of so many rows, queued back to back over all slots: what a step takes
        where the host is never late. The inputs are those of the steps staged last; 0 where it was not captured."""
        assert self.graphs is not None
        bucket = self.graphs.bucket(num_rows)
        graphs = [self.graphs.graph(slot, bucket, Flavour.TEXT) for slot in self.slots]
        ready = [graph for graph in graphs if graph is not None]
        if not ready:
            return 0.0
        compute, num = self.device.compute, REPLAYS if self.device.torch_device.type == "cuda" else 2
        with compute.use():
            ready[0].replay()  # the device is at work while the first of those measured is queued
            begun = compute.record()
            for i in range(num):
                ready[i % len(ready)].replay()
            ended = compute.record()
        ended.synchronize()
        return begun.elapsed_s(ended) / num
