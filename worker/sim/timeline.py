"""Owns the simulated device's clock, streams and events: when queued work would have run. Decode thread.

Operations are closures with a cost. They take effect in the order in which a real device would finish them, and as late
as the host can observe: when it asks for an event behind them. So host memory that is overwritten too early is read
overwritten, as it would be by a GPU that runs behind.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Time in seconds, and a way to let it pass."""

    def now(self) -> float:
        """Seconds since some start."""

    def sleep_until(self, at_s: float) -> None:
        """Return at `at_s` or later."""


class VirtualClock:
    """Moves only when told to: every interleaving is reproducible."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        return self._now_s

    def sleep_until(self, at_s: float) -> None:
        self._now_s = max(self._now_s, at_s)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now_s += seconds


class RealClock:
    """The monotonic clock; waits without using the CPU but for the last stretch, which it spins."""

    SPIN_S = 60e-6  # a sleep overshoots by about this much

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, at_s: float) -> None:
        while (left_s := at_s - time.perf_counter()) > 0:
            if left_s > self.SPIN_S:
                time.sleep(left_s - self.SPIN_S)


class SimEvent:
    """A point in a simulated stream."""

    __slots__ = ("_timeline", "at_s")

    def __init__(self, timeline: Timeline, at_s: float) -> None:
        self._timeline = timeline
        self.at_s = at_s

    def query(self) -> bool:
        return self.at_s <= self._timeline.clock.now()

    def synchronize(self) -> None:
        self._timeline.clock.sleep_until(self.at_s)
        self._timeline.run_until(self.at_s)


class SimStream:
    """An ordered queue: an operation starts when the one before it, and every event that it waits for, is over."""

    __slots__ = ("_ready_s", "_timeline", "busy_until_s")

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._ready_s = 0.0
        self.busy_until_s = 0.0

    def queue(self, effect: Callable[[], None], cost_s: float) -> tuple[float, float]:
        """Queue an operation; returns when it starts and ends."""
        start_s = max(self._timeline.clock.now(), self.busy_until_s, self._ready_s)
        self.busy_until_s = start_s + cost_s
        self._timeline.push(self.busy_until_s, effect)
        return start_s, self.busy_until_s

    def record(self) -> SimEvent:
        return SimEvent(self._timeline, max(self.busy_until_s, self._ready_s))

    def wait(self, event: SimEvent) -> None:
        self._ready_s = max(self._ready_s, event.at_s)


class Timeline:
    """All queued operations of one simulated device."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def push(self, end_s: float, effect: Callable[[], None]) -> None:
        """Queue an effect for the moment its operation ends; ties keep the order of queueing."""
        self._count += 1
        heapq.heappush(self._queue, (end_s, self._count, effect))

    def run_until(self, at_s: float) -> None:
        """Let every operation that ends by `at_s` take effect."""
        while self._queue and self._queue[0][0] <= at_s:
            heapq.heappop(self._queue)[2]()

    @property
    def num_pending(self) -> int:
        """Operations whose effect is still to come."""
        return len(self._queue)
