"""Owns what interleaved rounds of several engines add up to: medians, and medians of the ratios within a round.

A shared machine drifts by more than engines differ, so a ratio is only ever taken between runs of the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Measured = TypeVar("Measured")
Round = Mapping[str, Measured]
"""The run of each engine in one round, by the engine's name; engines that failed are missing."""


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known, None of nothing."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def median_ratio(
    rounds: Sequence[Round[Measured]], name: str, reference: str, figure: Callable[[Measured], float | None]
) -> float | None:
    """The median over the rounds of `name`'s figure over `reference`'s of the same round; None without a pair."""
    ratios: list[float | None] = []
    for one in rounds:
        if name in one and reference in one:
            ours, theirs = figure(one[name]), figure(one[reference])
            ratios.append(ours / theirs if ours is not None and theirs else None)
    return median(ratios)


def quicker(
    rounds: Sequence[Round[Measured]], names: Sequence[str], figure: Callable[[Measured], float | None]
) -> str:
    """Which of `names` has the highest median figure; the first where none has one."""
    best = {name: median(figure(one[name]) for one in rounds if name in one) or 0.0 for name in names}
    return max(names, key=lambda name: best[name])


def same_share(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """The share of positions at which two runs over the same prompts have the same token."""
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=False)]
    longest = sum(max(len(x), len(y)) for x, y in zip(a, b, strict=True))
    return sum(x == y for x, y in pairs) / longest if longest else 0.0


def turns(names: Sequence[str], num_rounds: int) -> list[list[str]]:
    """The order of each round (A B C, B C A, …), so that each engine runs first in some round."""
    if not names:
        return [[] for _ in range(num_rounds)]
    return [[*names[shift:], *names[:shift]] for shift in (index % len(names) for index in range(num_rounds))]


def rounded(values: Mapping[str, Any], digits: int = 3) -> dict[str, Any]:
    """For JSON: floats to so many digits."""
    return {
        name: round(value, digits) if isinstance(value, float) else value for name, value in values.items()
    }


def times(ratio: float | None) -> str:
    """A ratio for a table."""
    return "–" if ratio is None else f"{ratio:.2f}×"


def figure(value: float | None, digits: int = 0) -> str:
    """A figure for a table."""
    return "–" if value is None else f"{value:.{digits}f}"
