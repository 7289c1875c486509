"""Owns counting durations into the buckets both sides agreed on. Plain arithmetic; each one belongs to one thread."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from shared.protocol import HISTOGRAM_BUCKETS_S


class Histogram:
    """Counts of durations by the buckets of `HISTOGRAM_BUCKETS_S`, with one more for everything above."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(HISTOGRAM_BUCKETS_S) + 1)
        self.total_s = 0.0

    def observe(self, value_s: float, count: int = 1) -> None:
        """Count one duration, or `count` equal ones; a bucket's bound belongs to it."""
        self.counts[bisect_left(HISTOGRAM_BUCKETS_S, value_s)] += count
        self.total_s += value_s * count

    def cumulative(self) -> list[float]:
        """The number of durations up to each bound, then the number of all: Prometheus' form."""
        return list(accumulate(map(float, self.counts)))

    def export(self) -> list[float]:
        """The cumulative counts, then the sum in seconds: a `Beat`'s form."""
        return [*self.cumulative(), self.total_s]
