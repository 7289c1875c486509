"""Owns whose turn it is where several parties wait for the same few workers: one each in turn, whoever asked most. Pure.

The caller brings what waits; `gateway` lets coroutines wait, `worker` threads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items by party. `pop` takes the oldest item of the party that has waited longest for a turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def push(self, party: str, item: T) -> None:
        """Add an item behind the party's others."""
        self._waiting.setdefault(party, deque()).append(item)
        self._num += 1

    def pop(self) -> T:
        """Take the next item. Raises IndexError when none waits."""
        if not self._waiting:
            raise IndexError("nothing waits")
        party, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[party] = items  # behind everybody else
        self._num -= 1
        return item
