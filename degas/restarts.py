"""Owns the decision whether, and how soon, a dead child is started again. The time comes in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """How patient a supervisor is."""

    first_delay_s: float = 0.2
    max_delay_s: float = 10.0
    healthy_s: float = 60.0  # after being ready for so long, earlier deaths are forgotten
    quick_s: float = 5.0  # ready for less than this, or never, is a quick death
    max_quick_deaths: int = 5  # in a row: a crash loop


class Restarts:
    """Counts one child's deaths and decides about the next start."""

    def __init__(self, limits: RestartLimits) -> None:
        self._limits = limits
        self.num_deaths = 0  # ever
        self.quick_deaths = 0  # in a row
        self._delay_s = limits.first_delay_s

    def on_death(self, ready_for_s: float | None) -> float | None:
        """The seconds to wait before starting again; None: give up. `ready_for_s` None: it never was ready."""
        limits = self._limits
        self.num_deaths += 1
        if ready_for_s is not None and ready_for_s >= limits.healthy_s:
            self._delay_s = limits.first_delay_s
        if ready_for_s is None or ready_for_s < limits.quick_s:
            self.quick_deaths += 1
        else:
            self.quick_deaths = 0
        if self.quick_deaths >= limits.max_quick_deaths:
            return None
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, limits.max_delay_s)
        return delay_s
