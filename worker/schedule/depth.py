"""Owns how many steps may be in flight: two, or more while that loses less of the device. Pure; decode thread.

A third step in flight rides out a host that is late by less than a step. Its price is zombies: a sequence that
ends by a stop token leaves one more row computed in vain. Both are losses of the device's time, so both are
measured at both depths, and the one that loses less stays until the next comparison.
"""

from __future__ import annotations

WINDOW_STEPS = 256  # steps one verdict is based on
WINDOWS_BETWEEN_TRIALS = 40
WORTH_TRYING = 0.01  # idle share of the device's time at two steps in flight above which three are tried


class DepthGovernor:
    """Chooses between two steps in flight and `deepest`."""

    __slots__ = (
        "_busy_s",
        "_idle_s",
        "_num_rows",
        "_num_steps",
        "_num_zombies",
        "_until_trial",
        "deepest",
        "depth",
        "loss",
    )

    def __init__(self, deepest: int) -> None:
        if deepest < 3:
            raise ValueError(f"deepest is {deepest}: there is nothing to choose; a safe value is 3")
        self.deepest = deepest
        self.depth = 2
        # By depth, as last measured: idle and zombie shares of the device's time.
        self.loss: dict[int, float] = {}
        self._until_trial = 0
        self._reset()

    def _reset(self) -> None:
        self._num_steps = self._num_rows = self._num_zombies = 0
        self._busy_s = self._idle_s = 0.0

    def on_commit(self, busy_s: float, idle_s: float, num_rows: int, num_zombies: int) -> None:
        """A step that ran with the pipeline as deep as `depth` allows; `idle_s`: the device's, before it."""
        self._num_steps += 1
        self._busy_s += busy_s
        self._idle_s += idle_s
        self._num_rows += num_rows
        self._num_zombies += num_zombies
        if self._num_steps >= WINDOW_STEPS:
            self._decide()
            self._reset()

    def _decide(self) -> None:
        idle = self._idle_s / max(self._idle_s + self._busy_s, 1e-9)
        self.loss[self.depth] = idle + self._num_zombies / max(self._num_rows, 1)
        self._until_trial -= 1
        if self._until_trial > 0:
            return
        other = self.deepest if self.depth == 2 else 2
        if other not in self.loss:
            if self.depth == 2 and idle < WORTH_TRYING:
                return
            self.depth = other  # the trial
            return
        self.depth = min(self.loss, key=self.loss.__getitem__)
        # The other depth is measured again at its next trial.
        self._until_trial = WINDOWS_BETWEEN_TRIALS
        self.loss = {self.depth: self.loss[self.depth]}
