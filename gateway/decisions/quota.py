"""Owns how many lines a second the log takes about clients' own faults, so that a flood does not fill the log. Pure."""

from __future__ import annotations


class LogQuota:
    """Lets through `lines_per_s` lines a second; the next line let through tells how many were left out."""

    def __init__(self, lines_per_s: int) -> None:
        self._lines_per_s = lines_per_s
        self._second = -1
        self._num_said = 0
        self._num_left_out = 0

    def take(self, now_s: float) -> int | None:
        """None: leave this line out. Otherwise the number of lines left out since the last one let through."""
        second = int(now_s)
        if second != self._second:
            self._second, self._num_said = second, 0
        if self._num_said >= self._lines_per_s:
            self._num_left_out += 1
            return None
        self._num_said += 1
        num_left_out, self._num_left_out = self._num_left_out, 0
        return num_left_out
