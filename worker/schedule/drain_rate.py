"""Owns how fast sequences end while others wait, by which gateways decide whom to refuse. Pure; decode thread."""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_S: Final = 5.0
LEAST_WINDOW_S: Final = 0.5  # what ends in less tells too little


class DrainRate:
    """Sequences ended per second over the last `WINDOW_S`, or since some have been waiting.

    What ended before anybody waited tells how much was asked for, not how fast the worker is: one that has just been
    started would seem to be the slowest of all, and gateways would refuse newcomers for nothing.
    """

    def __init__(self) -> None:
        self._ends_s: deque[float] = deque()
        self._crowded_s: float | None = None  # since when sequences have been waiting

    def on_end(self, now_s: float) -> None:
        """A sequence has ended."""
        self._ends_s.append(now_s)

    def per_s(self, now_s: float, num_waiting: int) -> float:
        """The rate, while so many wait; 0: not known yet."""
        since_s = now_s - WINDOW_S
        while self._ends_s and self._ends_s[0] <= since_s:
            self._ends_s.popleft()
        if not num_waiting:
            self._crowded_s = None
            return len(self._ends_s) / WINDOW_S
        if self._crowded_s is None:
            self._crowded_s = now_s
        since_s = max(since_s, self._crowded_s)
        if now_s - since_s < LEAST_WINDOW_S:
            return 0.0
        return sum(at > since_s for at in self._ends_s) / (now_s - since_s)
