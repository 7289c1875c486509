"""Owns the budget of a sequence's thought: counts its tokens, and forces its closing mark when they are used up. Pure; decode thread.

A `Constraint` that nearly always allows everything. So that its row need not wait for the host at every step, it says for
which tokens it may have to (`may_force`); only those are sampled behind a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

_OPENS_WITHIN = 8
"""A thought opens among the first tokens of an answer, or there is none: white space may stand before it."""


class _Stage(Enum):
    BEFORE = 0
    INSIDE = 1
    CLOSING = 2
    AFTER = 3


class ThoughtBudget:
    """One sequence's thought: `budget` tokens between the marks `opens` (empty: it is open already) and `closes`."""

    __slots__ = ("_budget", "_closes", "_matched", "_num_seen", "_num_used", "_opens", "_stage")

    def __init__(self, budget: int, opens: Sequence[int], closes: Sequence[int]) -> None:
        assert closes
        self._budget = budget
        self._opens = tuple(opens)
        self._closes = tuple(closes)
        self._stage = _Stage.BEFORE if opens else _Stage.INSIDE
        self._matched = 0  # leading ids of the mark that is looked for, or written
        self._num_seen = 0
        self._num_used = 0
        self._close_if_used()

    @property
    def is_spent(self) -> bool:
        """Whether nothing will be forced any more."""
        return self._stage is _Stage.AFTER

    def may_force(self, index: int, num_committed: int) -> bool:
        """Whether the generated token at `index` may have to be a forced one, as far as the committed tokens tell."""
        ahead = index - num_committed
        if self._stage is _Stage.AFTER:
            return False
        if self._stage is _Stage.CLOSING:
            return ahead < len(self._closes) - self._matched
        if self._stage is _Stage.INSIDE:
            left = self._budget - self._num_used
            return left <= ahead < left + len(self._closes)
        return ahead >= len(self._opens) - self._matched + self._budget

    def fill_mask(self, words: npt.NDArray[np.int32]) -> None:
        """See `Constraint`: everything, or the next id of the closing mark alone."""
        if self._stage is not _Stage.CLOSING:
            words[:] = -1
            return
        words[:] = 0
        token_id = self._closes[self._matched]
        words.view(np.uint32)[token_id // 32] = 1 << (token_id % 32)

    def advance(self, token_id: int) -> None:
        """See `Constraint`. Raises ValueError for another token than the forced one."""
        if self._stage is _Stage.AFTER:
            return
        if self._stage is _Stage.CLOSING:
            if token_id != self._closes[self._matched]:
                raise ValueError(f"token {token_id} where the thought's closing mark was forced")
            self._matched += 1
            if self._matched == len(self._closes):
                self._stage = _Stage.AFTER
            return
        is_before = self._stage is _Stage.BEFORE
        self._num_seen += 1
        self._num_used += not is_before
        mark = self._opens if is_before else self._closes
        self._matched = _matched(mark, self._matched, token_id)
        if self._matched == len(mark):
            self._stage = _Stage.INSIDE if is_before else _Stage.AFTER
            self._matched = 0
        elif is_before and self._num_seen - self._matched >= _OPENS_WITHIN:
            self._stage = _Stage.AFTER
        self._close_if_used()

    def is_complete(self) -> bool:
        """See `Constraint`: the answer follows."""
        return False

    def _close_if_used(self) -> None:
        if self._stage is _Stage.INSIDE and self._num_used >= self._budget:
            self._stage = _Stage.CLOSING  # from where the mark that the model may have begun itself goes on


def _matched(mark: tuple[int, ...], num: int, token_id: int) -> int:
    """How many leading ids of `mark` the tokens end with, after `num` of them and one more token."""
    seen = (*mark[:num], token_id)
    return next(n for n in range(len(seen), -1, -1) if seen[len(seen) - n :] == mark[:n])
