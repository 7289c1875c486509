"""Owns the guess of when the device will run dry, so that the next step is launched just before. Pure; decode thread.

A step launched early cannot take in what arrives meanwhile: a new request then waits one step longer than a
blocking loop would make it wait. Launching late gives that step back without letting the device go idle.
"""

from __future__ import annotations

SMOOTHING = 0.2
MARGIN_S = 150e-6  # for sleeping and waking, with some reserve
HOST_FACTOR = 1.5  # planning and launching take this much of their usual time at worst


class LaunchTimer:
    """Learns decode steps' periods by batch size, and the host's time to launch one.

    A period is the time between two commits that both had to wait for the device: only then does it measure
    the device and not the host.
    """

    __slots__ = ("_host_s", "_last_commit_s", "_last_waited", "_period_s")

    def __init__(self) -> None:
        self._period_s: dict[int, float] = {}
        self._host_s = 0.0
        self._last_commit_s = 0.0
        self._last_waited = False

    def on_launch(self, host_s: float) -> None:
        """A step took `host_s` to plan and launch."""
        self._host_s += SMOOTHING * (host_s - self._host_s) if self._host_s else host_s

    def on_commit(self, now_s: float, num_rows: int, *, is_decode: bool, waited: bool) -> None:
        """A step of `num_rows` decode rows (and nothing else, if `is_decode`) was committed at `now_s`."""
        if is_decode and waited and self._last_waited:
            period_s = now_s - self._last_commit_s
            known_s = self._period_s.get(num_rows)
            # The guess falls at once and rises slowly: too short a guess costs nothing, too long a guess makes a bubble.
            if known_s is None or period_s < known_s:
                self._period_s[num_rows] = period_s
            else:
                self._period_s[num_rows] = known_s + SMOOTHING * 0.25 * (period_s - known_s)
        self._last_commit_s = now_s
        self._last_waited = waited

    def launch_at_s(self, num_rows: int) -> float:
        """When to begin launching behind a decode step of `num_rows` rows that started at the last commit; a
        time in the past (0) when nothing is known."""
        period_s = self._period_s.get(num_rows)
        if period_s is None or not self._last_waited:
            return 0.0
        return self._last_commit_s + period_s - HOST_FACTOR * self._host_s - MARGIN_S
