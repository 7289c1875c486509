"""The grammar of detect and point answers written out: the oracle that token automata must agree with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class SpatialGrammar:
    """Order of a detect or point answer: (coord, coord[, size])*, then an end id.

    States: 0 before an object (coord or end), 1 before y (coord), 2 before the size (size id), 3 after the end,
    which absorbs: ends may follow and nothing else.
    """

    __slots__ = ("_coord_id", "_end_id", "_max_objects", "_size_id", "_with_size", "num_objects", "state")

    def __init__(
        self, *, coord_id: int, size_id: int, end_id: int, with_size: bool, max_objects: int
    ) -> None:
        self._coord_id = coord_id
        self._size_id = size_id
        self._end_id = end_id
        self._with_size = with_size
        self._max_objects = max_objects
        self.state = 0
        self.num_objects = 0

    def allowed_ids(self) -> tuple[int, ...]:
        """The ids that may come next, one or two of them."""
        if self.state == 0:
            return (
                (self._end_id,) if self.num_objects >= self._max_objects else (self._coord_id, self._end_id)
            )
        return ((self._coord_id,), (self._size_id,), (self._end_id,))[self.state - 1]

    def fill_mask(self, words: npt.NDArray[np.int32]) -> None:
        words[:] = 0
        view = words.view(np.uint32)
        for token_id in self.allowed_ids():
            view[token_id >> 5] |= np.uint32(1 << (token_id & 31))

    def advance(self, token_id: int) -> None:
        if token_id not in self.allowed_ids():
            raise ValueError(f"token {token_id} in spatial state {self.state}")
        if self.state == 0:
            self.state = 1 if token_id == self._coord_id else 3
        elif self.state == 3:
            pass
        elif self.state == 1 and self._with_size:
            self.state = 2
        else:
            self.state = 0
            self.num_objects += 1

    def is_complete(self) -> bool:
        return self.state == 3 or (self.state == 0 and self.num_objects >= self._max_objects)
