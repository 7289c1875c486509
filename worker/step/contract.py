"""Owns the seam between the engine and whatever runs its steps. Decode thread.

The engine calls, per step and in this order: `launch_forward`, `launch_sampling` once or twice (unconstrained
rows at once; constrained rows when their masks are ready), `launch_copy`, and later `wait`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from shared.protocol import PageFormat
from worker.schedule.plan import StepPlan, StepResult


class DeviceTimes(NamedTuple):
    """What the device did around one step, in its own seconds."""

    busy_s: float  # from the step's forward to its last sampled row
    idle_s: float  # between the step before it and its forward, uploads included
    copy_s: float  # from sampled to the outputs being on the host


class OutOfDeviceMemory(RuntimeError):
    """The chunks of a step found no memory on the device; its decode rows are queued all the same."""


@dataclass(slots=True)
class GraphCounts:
    """How captures ended, and how often steps ran without a graph, over all kinds of graphs. For the metrics."""

    eager_steps_total: dict[str, int] = field(default_factory=dict)  # by flavour, `chunk` and `vision`
    captures_total: dict[str, int] = field(default_factory=dict)  # startup, late, failed

    def add_eager(self, kind: str) -> None:
        """A step, or a batch of crops, ran without a graph."""
        self.eager_steps_total[kind] = self.eager_steps_total.get(kind, 0) + 1

    def add_capture(self, kind: str) -> None:
        """A capture ended."""
        self.captures_total[kind] = self.captures_total.get(kind, 0) + 1


Progress = Callable[[], None]
"""Called between the parts of a step that runs while the host waits, because a heartbeat may be due."""


class Runner(Protocol):
    """The runner of the engine's steps: `worker.step.torch_runner.TorchRunner` or `worker.sim.runner.SimRunner`."""

    num_slots: int
    graph_counts: GraphCounts

    def launch_forward(self, slot_number: int, plan: StepPlan, progress: Progress) -> None:
        """Queue uploads and the forward of `plan` in the slot; a device that runs it at once calls `progress` meanwhile.

        Raises `OutOfDeviceMemory` when only the chunks could not be queued: what their rows sample means nothing.
        """

    def launch_sampling(self, slot_number: int, plan: StepPlan, picks: list[int], *, masked: bool) -> None:
        """Queue sampling of the samples at `picks`. `masked`: `mask_rows(slot_number)` holds their masks, by sample."""

    def launch_copy(self, slot_number: int, plan: StepPlan) -> None:
        """Queue the copy of the outputs to the host."""

    def mask_rows(self, slot_number: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """The slot's host mask buffer, (max_rows, words): row i belongs to sample i."""

    def is_done(self, slot_number: int) -> bool:
        """Whether the outputs have reached the host."""

    def wait_rows(self, slot_number: int, plan: StepPlan) -> StepResult | None:
        """Where the decode rows of a step with chunks are copied out before the chunks are through: block until they have
        reached the host, and read them. None where all samples come together."""

    def wait(self, slot_number: int, plan: StepPlan) -> StepResult:
        """Block until the outputs have reached the host, and read them all (I4). Raises RuntimeError on a device fault."""

    def device_times(self, slot_number: int) -> DeviceTimes:
        """The slot's last step, once it was waited for."""


class PageStore(Protocol):
    """A runner's KV memory as others get it: `worker.step.page_store.TorchPages` or `worker.sim.page_store.SimPages`."""

    format: PageFormat

    def read(self, pages: Sequence[int]) -> bytes:
        """The contents of pages that no step in flight writes to, in this order, `format.page_bytes` each."""

    def write(self, pages: Sequence[int], data: bytes | memoryview) -> None:
        """Fill pages that nothing reads or writes; steps that are launched from here on may. `data` may be given up."""
