"""Owns what processes held over time, and its slope: memory and descriptors of every post, a life after a life. No clock.

A post is a place, such as "worker"; a life is one process in it, from its start to its death. Memory of a new life
begins anew, so lives are never joined into one line: the slope is the one that all of them have in common, each with a
height of its own (the pooled within-group slope of the analysis of covariance).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

MB: Final = 1e6
MIN_SAMPLES: Final = 3


@dataclass(slots=True)
class Life:
    """One process, or one set of helpers: `key` is its identity."""

    key: Hashable
    samples: list[tuple[float, int]] = field(default_factory=list)  # seconds, bytes

    def settled(self, warm_up_s: float) -> list[tuple[float, int]]:
        """The samples after its own warm-up."""
        begin_s = self.samples[0][0] + warm_up_s
        return [sample for sample in self.samples if sample[0] >= begin_s]


@dataclass(frozen=True, slots=True)
class Slope:
    """What a post's memory did after each life's warm-up."""

    mb_per_hour: float
    measured_s: float  # of all lives that count, together
    is_long: bool  # whether lives were long enough to judge by
    first_mb: float
    last_mb: float
    num_lives: int


class Lives:
    """All posts' lives."""

    def __init__(self) -> None:
        self.posts: dict[str, list[Life]] = {}

    def on_sample(self, post: str, key: Hashable, at_s: float, num_bytes: int) -> None:
        """A reading of the process `key` in a post."""
        lives = self.posts.setdefault(post, [])
        if not lives or lives[-1].key != key:
            lives.append(Life(key))
        lives[-1].samples.append((at_s, num_bytes))

    def slope(self, post: str, warm_up_s: float, long_s: float) -> Slope | None:
        """Of one post; None where no life outlasted its warm-up.

        Lives of at least `long_s` after their warm-up count alone if there are any: in minutes an allocator's steps of a quarter
        megabyte are steep.
        """
        lives = self.posts.get(post, [])
        settled = [samples for life in lives if len(samples := life.settled(warm_up_s)) >= MIN_SAMPLES]
        long = [samples for samples in settled if samples[-1][0] - samples[0][0] >= long_s]
        counted = long or settled
        bytes_per_s = pooled_slope(counted)
        if bytes_per_s is None:
            return None
        return Slope(
            mb_per_hour=bytes_per_s * 3600 / MB,
            measured_s=sum(samples[-1][0] - samples[0][0] for samples in counted),
            is_long=bool(long),
            first_mb=counted[0][0][1] / MB,
            last_mb=counted[-1][-1][1] / MB,
            num_lives=len(lives),
        )

    def curve(self, post: str, most: int = 60) -> list[list[tuple[float, float]]]:
        """Each life's samples as (seconds, MB), thinned to about so many."""
        found = []
        for life in self.posts.get(post, []):
            every = max(1, len(life.samples) // most)
            found.append([(round(at_s, 1), round(size / MB, 2)) for at_s, size in life.samples[::every]])
        return found


def pooled_slope(groups: Iterable[Sequence[tuple[float, float]]]) -> float | None:
    """The least-squares slope that groups of (x, y) have in common, each with its own mean; None without a spread of x."""
    sum_xx = sum_xy = 0.0
    for samples in groups:
        mean_x = sum(x for x, _ in samples) / len(samples)
        mean_y = sum(y for _, y in samples) / len(samples)
        sum_xx += sum((x - mean_x) ** 2 for x, _ in samples)
        sum_xy += sum((x - mean_x) * (y - mean_y) for x, y in samples)
    return sum_xy / sum_xx if sum_xx > 0 else None


def middle_slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The median of the slopes between all pairs of points (Theil 1950, Sen 1968): a few odd ones do not move it."""
    slopes = sorted(
        (y2 - y1) / (x2 - x1)
        for place, (x1, y1) in enumerate(points)
        for x2, y2 in points[place + 1 :]
        if x2 != x1
    )
    if not slopes:
        return None
    middle = len(slopes) // 2
    return slopes[middle] if len(slopes) % 2 else (slopes[middle - 1] + slopes[middle]) / 2
