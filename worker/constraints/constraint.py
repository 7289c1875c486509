"""Owns constraints on a sequence's tokens: which ids may come next. State that follows the sequence (I9).

A constraint is advanced exactly once for each committed token, on the decode thread, and asked for the
allowed ids of the next one. Rows that have one are *deferred*: forward now, sample when the mask is up.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Constraint(Protocol):
    """The state of one constrained sequence."""

    def fill_mask(self, words: npt.NDArray[np.int32]) -> None:
        """Write the allowed ids of the next token as a bit mask: id i is bit i % 32 of `words[i // 32]`."""

    def advance(self, token_id: int) -> None:
        """Take the committed token. Raises ValueError when the grammar does not allow it."""

    def is_complete(self) -> bool:
        """Whether only an end may follow."""
