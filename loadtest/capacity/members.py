"""Owns what simulated members do: a station of servers with one queue, and a worker that decodes its rows together.

Times are seconds of the simulation. Both are told of events in order of time.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from loadtest.capacity.costs import DeviceCosts

FOREVER: Final = float("inf")
TURNOVER_STEPS: Final = 1.5
"""From a row's last token until its place is another's: that token must reach the host, which has launched a step already."""

PAGE_TOKENS: Final = 16
"""Of a prompt that was computed elsewhere so many tokens at most, its last page's, are computed where it is decoded."""


class Station:
    """Servers with one queue, first come first served: whoever is free first takes the next (M/G/c where arrivals are Poisson)."""

    def __init__(self, servers: int) -> None:
        self.num = servers
        self._taken_s = 0.0
        self._free_at = [0.0] * servers

    def take(self, now_s: float, work_s: float, until_passed_on_s: float | None = None) -> float:
        """Serve for `work_s`; returns when the request goes on, `until_passed_on_s` after its service began (None: at its end)."""
        begin_s = max(now_s, self._free_at[0])
        heapq.heapreplace(self._free_at, begin_s + work_s)
        self._taken_s += work_s
        return begin_s + (work_s if until_passed_on_s is None else until_passed_on_s)

    def done_s(self, now_s: float) -> float:
        """Seconds of work that all servers have done by now."""
        return self._taken_s - sum(max(0.0, free_s - now_s) for free_s in self._free_at)


class Emptiest:
    """Which of many members has the fewest requests; every look and every change takes the same short time."""

    def __init__(self, num: int) -> None:
        self._by_load: list[set[int]] = [set(range(num))]
        self._low = 0

    def lowest(self) -> int:
        """One with the fewest."""
        return next(iter(self._by_load[self._low]))

    def change(self, which: int, before: int, now: int) -> None:
        """A member's number changed."""
        self._by_load[before].discard(which)
        while len(self._by_load) <= now:
            self._by_load.append(set())
        self._by_load[now].add(which)
        self._low = min(self._low, now)
        while not self._by_load[self._low]:
            self._low += 1


@dataclass(slots=True)
class Row:
    """A request on a worker that decodes: `prefill_s` of device time, then `tokens` more."""

    number: int
    tokens: float  # after the first
    prefill_s: float = 0.0
    prompt_tokens: float = 0.0


@dataclass(slots=True)
class Worker:
    """Rows that share a step: with n of them each gets a token every step(n) seconds, and prompts hold all of them up.

    `clock` counts steps: a row that enters at clock v with t tokens ends at v + t (processor sharing with a rate that
    depends on the number of rows). A prompt occupies the device for its own time and the step it rides in.
    """

    costs: DeviceCosts
    max_rows: int
    max_waiting: int
    waiting: deque[Row] = field(default_factory=deque)
    num_coming: int = 0  # placed here, and still at an encoder or a prefill worker
    num_rows: int = 0  # decoding, or in prefill
    version: int = 0  # of what is to happen next: whatever was scheduled before a change no longer holds
    busy_s: float = 0.0
    clock: float = 0.0
    _ends: list[tuple[float, int]] = field(default_factory=list)  # (clock, number) of decoding rows
    _now_s: float = 0.0
    _holds: deque[tuple[float, float]] = field(default_factory=deque)
    # of prompts that occupy the device: until when, and how many steps a second rows meanwhile get

    @property
    def load(self) -> int:
        """Requests here."""
        return self.num_rows + len(self.waiting) + self.num_coming

    @property
    def is_full(self) -> bool:
        """Whether a newcomer is refused."""
        return self.load >= self.max_rows + self.max_waiting

    def advance(self, now_s: float) -> None:
        """Let the time pass."""
        at_s = self._now_s
        self._now_s = now_s
        while self._holds and at_s < now_s:
            end_s, rate = self._holds[0]
            until_s = min(now_s, end_s)
            self.clock += (until_s - at_s) * rate
            self.busy_s += until_s - at_s
            at_s = until_s
            if end_s <= now_s:
                self._holds.popleft()
        if at_s < now_s and self._ends:
            self.clock += (now_s - at_s) / self.costs.step_s(len(self._ends))
            self.busy_s += now_s - at_s

    def admit(self, row: Row) -> float:
        """Give a row its place now; returns when its first token is out. `advance` was told the time."""
        now_s, costs = self._now_s, self.costs
        self.num_rows += 1
        if not row.prefill_s:
            return now_s
        num = len(self._ends)
        step_s = costs.step_s(max(1, num))
        steps = row.prompt_tokens / costs.mixed_tokens
        if self._holds:
            begin_s = self._holds[-1][0]
            steps = min(1.0, steps)  # behind other prompts, with whom it shares a step where it is short
        else:
            begin_s = now_s
            steps = max(1.0, steps) + (0.5 if num else 0.0)  # half of the step that runs as it comes
        took_s = row.prefill_s + steps * step_s
        self._holds.append((begin_s + took_s, steps / took_s))
        self.version += 1
        return begin_s + took_s

    def begin(self, row: Row) -> None:
        """Its first token is out: it decodes from now on. `advance` was told the time."""
        heapq.heappush(self._ends, (self.clock + row.tokens, row.number))
        self.version += 1

    def next_end_s(self) -> float:
        """When the next row ends if nothing else happens."""
        if not self._ends:
            return FOREVER
        left, at_s = self._ends[0][0] - self.clock, self._now_s
        if left <= 0:
            return at_s
        for end_s, rate in self._holds:
            steps = (end_s - at_s) * rate
            if steps >= left:
                return at_s + left / rate
            left -= steps
            at_s = end_s
        return at_s + left * self.costs.step_s(len(self._ends))

    def drop(self, number: int) -> None:
        """A row that has begun ends at once: its first token was its last."""
        self._ends = [end for end in self._ends if end[1] != number]
        heapq.heapify(self._ends)
        self.version += 1

    def end(self) -> int:
        """The row that is due has its last token; returns its number. Its place is free `turnover_s` later."""
        self.version += 1
        return heapq.heappop(self._ends)[1]

    @property
    def turnover_s(self) -> float:
        """From a row's end to its release."""
        return TURNOVER_STEPS * self.costs.step_s(max(1, len(self._ends)))

    def release(self) -> None:
        """The place of a row that has ended is free."""
        self.num_rows -= 1
