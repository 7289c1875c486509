"""Owns the decision whether, and how soon, a dead child is started again. The time comes in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """How patient a supervisor is. A child that has served is started again at once; only a loop of crashes is slowed."""

    first_delay_s: float = 0.2
    max_delay_s: float = 10.0
    brief_s: float = 1.0  # ready for less than this is a brief life
    free_restarts: int = (
        2  # brief lives in a row that cost no delay: a request that kills is tried again twice
    )
    max_failed_starts: int = 5  # in a row: it cannot start at all
    max_brief_lives: int = 20  # in a row: it starts, and dies of the first thing it does


class Restarts:
    """Counts one child's deaths and decides about the next start."""

    def __init__(self, limits: RestartLimits) -> None:
        self._limits = limits
        self.num_deaths = 0  # ever
        self._failed_starts = 0  # in a row
        self._brief_lives = 0  # in a row, or with nothing but failed starts between them

    @property
    def quick_deaths(self) -> int:
        """Deaths in a row before the child was ready or right after."""
        return self._failed_starts + self._brief_lives

    def on_death(self, ready_for_s: float | None) -> float | None:
        """The seconds to wait before starting again; None: give up. `ready_for_s` None: it never was ready."""
        limits = self._limits
        self.num_deaths += 1
        if ready_for_s is None:
            self._failed_starts += 1
        else:
            self._failed_starts = 0
            self._brief_lives = self._brief_lives + 1 if ready_for_s < limits.brief_s else 0
        if self._failed_starts >= limits.max_failed_starts or self._brief_lives >= limits.max_brief_lives:
            return None
        num_doublings = self._failed_starts + max(0, self._brief_lives - limits.free_restarts) - 1
        return (
            0.0 if num_doublings < 0 else min(limits.first_delay_s * 2.0**num_doublings, limits.max_delay_s)
        )
