"""Owns latency histograms: seconds in, HDR-recorded microseconds inside, milliseconds out. Used from one task.

HDR histograms keep three significant digits over the whole range in constant memory, merge exactly, and
travel in the JSON report in their own base64 encoding, so that runs can be added up later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from hdrh.histogram import HdrHistogram

LOWEST_US: Final = 1
HIGHEST_US: Final = 600_000_000
SIGNIFICANT_DIGITS: Final = 3

PERCENTILES: Final = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Bucket:
    """`count` values in the half-open range from `low_ms` to `high_ms`."""

    low_ms: float
    high_ms: float
    count: int


class Histogram:
    """Durations of one kind."""

    __slots__ = ("_hdr", "_sum_s")

    def __init__(self) -> None:
        self._hdr = HdrHistogram(LOWEST_US, HIGHEST_US, SIGNIFICANT_DIGITS)
        self._sum_s = 0.0

    def record(self, seconds: float) -> None:
        """Count one duration; outside 1 µs to 600 s it counts as the nearest bound."""
        micros = round(seconds * 1e6)
        self._hdr.record_value(min(max(micros, LOWEST_US), HIGHEST_US))
        self._sum_s += seconds

    def add(self, other: Histogram) -> None:
        """Take in every value of another histogram."""
        self._hdr.add(other._hdr)
        self._sum_s += other._sum_s

    def __getstate__(self) -> tuple[str, float]:
        """For another process: the counts in HDR's own encoding, and the sum."""
        return (self._hdr.encode().decode() if len(self) else "", self._sum_s)

    def __setstate__(self, state: tuple[str, float]) -> None:
        encoded, self._sum_s = state
        self._hdr = HdrHistogram(LOWEST_US, HIGHEST_US, SIGNIFICANT_DIGITS)
        if encoded:
            self._hdr.decode_and_add(encoded)

    @classmethod
    def from_summary(cls, values: dict[str, Any]) -> Histogram:
        """The histogram of a JSON report. Raises `ValueError` for one that is damaged."""
        made = cls()
        try:
            made.__setstate__((str(values["hdr"]), float(values["mean"]) * int(values["count"]) / 1e3))
        except Exception as error:  # the library has exceptions of its own for each kind of damage
            raise ValueError(f"no histogram: {error}") from error
        return made

    def __len__(self) -> int:
        return int(self._hdr.get_total_count())

    @property
    def mean_ms(self) -> float:
        """The exact mean."""
        return self._sum_s / len(self) * 1e3 if len(self) else 0.0

    @property
    def min_ms(self) -> float:
        """The smallest value."""
        return float(self._hdr.get_min_value()) / 1e3 if len(self) else 0.0

    @property
    def max_ms(self) -> float:
        """The largest value."""
        return float(self._hdr.get_max_value()) / 1e3 if len(self) else 0.0

    def percentile_ms(self, percentile: float) -> float:
        """The value that `percentile` percent of all values do not exceed."""
        return float(self._hdr.get_value_at_percentile(percentile)) / 1e3 if len(self) else 0.0

    def summary(self) -> dict[str, Any]:
        """Count, mean, extremes and percentiles for the JSON report, and the histogram itself."""
        values: dict[str, Any] = {
            "count": len(self),
            "mean": round(self.mean_ms, 3),
            "min": round(self.min_ms, 3),
            "max": round(self.max_ms, 3),
        }
        values |= {f"p{percentile:g}": round(self.percentile_ms(percentile), 3) for percentile in PERCENTILES}
        values["hdr"] = self._hdr.encode().decode() if len(self) else ""
        return values

    def curve(self, num_points: int = 120) -> list[tuple[float, float]]:
        """`(nines, ms)` along the percentile curve; `nines` is −log10(1 − quantile), so 0.9 → 1, 0.99 → 2.

        It ends at one value in `count`: beyond that every percentile is the maximum.
        """
        if len(self) == 0:
            return []
        last = math.log10(max(len(self), 2))
        points = (index * last / (num_points - 1) for index in range(num_points - 1))
        curve = [(nines, self.percentile_ms(100 * (1 - 10**-nines))) for nines in points]
        return [*curve, (last, self.max_ms)]

    def buckets(self, per_decade: int = 12) -> list[Bucket]:
        """Counts in logarithmic buckets from the first value to the last, empty ones included."""
        if len(self) == 0:
            return []
        ratio = 10 ** (1 / per_decade)
        low = float(LOWEST_US)
        while low * ratio <= self._hdr.get_min_value():
            low *= ratio
        found: list[Bucket] = []
        high, count = low * ratio, 0
        for value, num_values in self._recorded():
            while value >= high:
                found.append(Bucket(low / 1e3, high / 1e3, count))
                low, high, count = high, high * ratio, 0
            count += num_values
        found.append(Bucket(low / 1e3, high / 1e3, count))
        return found

    def _recorded(self) -> Iterator[tuple[int, int]]:
        for item in self._hdr.get_recorded_iterator():
            yield int(item.value_iterated_to), int(item.count_added_in_this_iter_step)
