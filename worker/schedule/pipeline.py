"""Owns which slots are in flight and in what order they commit. Pure; decode thread.

A slot's life: free → launched (its forward is queued, unconstrained rows are sampled) → sampled (every row is sampled,
outputs are on their way to the host) → committed (the host has read them, I4) and free again. Steps commit in launch
order (I2). Illegal transitions raise `PipelineError` and change nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from worker.schedule.plan import StepPlan


class PipelineError(RuntimeError):
    """A transition out of order: our own bug."""


class SlotState(Enum):
    """The states of a slot."""

    FREE = "free"
    LAUNCHED = "launched"
    SAMPLED = "sampled"


@dataclass(slots=True, eq=False)
class InFlight:
    """One launched, uncommitted step."""

    slot: int
    plan: StepPlan
    state: SlotState
    launched_s: float
    follows: bool  # there was work ever since the step before it, so a gap between the two is a bubble


class Pipeline:
    """The ping-pong slots' state machine."""

    __slots__ = ("_free", "_in_flight", "num_slots")

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; a safe value is 2")
        self.num_slots = num_slots
        self._free: deque[int] = deque(range(num_slots))
        self._in_flight: deque[InFlight] = deque()

    def __len__(self) -> int:
        """Steps in flight."""
        return len(self._in_flight)

    @property
    def oldest(self) -> InFlight | None:
        """The step that commits next."""
        return self._in_flight[0] if self._in_flight else None

    @property
    def newest(self) -> InFlight | None:
        """The step launched last."""
        return self._in_flight[-1] if self._in_flight else None

    @property
    def expected_s(self) -> float:
        """Seconds that all steps in flight should take together."""
        return sum([step.plan.expected_s for step in self._in_flight])

    def can_launch(self, depth: int) -> bool:
        """Whether one more step may be launched at this depth.

        Never while the newest step still has rows to sample: the next forward feeds on their tokens (I1).
        """
        if len(self._in_flight) >= min(depth, self.num_slots) or not self._free:
            return False
        return not self._in_flight or self._in_flight[-1].state is SlotState.SAMPLED

    def launch(self, plan: StepPlan, now_s: float, *, follows: bool = False) -> InFlight:
        """Take a free slot for `plan`."""
        if not self._free:
            raise PipelineError("launch with every slot in flight")
        if self._in_flight and self._in_flight[-1].state is not SlotState.SAMPLED:
            raise PipelineError("launch before the previous step was sampled")
        step = InFlight(self._free.popleft(), plan, SlotState.LAUNCHED, now_s, follows)
        self._in_flight.append(step)
        return step

    def on_sampled(self, step: InFlight) -> None:
        """Every row of `step` has its sampling launched."""
        if step.state is not SlotState.LAUNCHED:
            raise PipelineError(f"slot {step.slot} sampled twice or after its commit")
        step.state = SlotState.SAMPLED

    def commit(self, step: InFlight) -> None:
        """The host has read all of `step`'s outputs: its slot is free."""
        if not self._in_flight or self._in_flight[0] is not step:
            raise PipelineError(f"slot {step.slot} committed out of launch order")
        if step.state is not SlotState.SAMPLED:
            raise PipelineError(f"slot {step.slot} committed before it was sampled")
        self._in_flight.popleft()
        step.state = SlotState.FREE
        self._free.append(step.slot)
