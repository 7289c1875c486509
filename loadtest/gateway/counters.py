"""Owns the figures that engine, client and command share: one mapped file of 64-bit integers. Any process, any thread.

All of them run on one machine and read one clock, CLOCK_MONOTONIC: a time that the engine wrote down is compared with
one that the client takes. Each place has one writer.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

STEPS: Final = 8192
"""Steps whose sending times are kept; a token's text is its step's number modulo this."""

_TOKENS: Final = 0
_ANSWERS: Final = 1
_FIRST_STEP: Final = 8


class Counters:
    """See the module."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        size = (_FIRST_STEP + STEPS) * 8
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._values = memoryview(self._map).cast("q")

    @property
    def tokens(self) -> int:
        """Tokens that the engine has sent."""
        return self._values[_TOKENS]

    @property
    def answers(self) -> int:
        """Whole answers that the client has received."""
        return self._values[_ANSWERS]

    def on_answer(self) -> None:
        """The client has one more."""
        self._values[_ANSWERS] += 1

    def on_step(self, step: int, now_ns: int, num_tokens: int) -> None:
        """The engine sends a step now."""
        self._values[_FIRST_STEP + step % STEPS] = now_ns
        self._values[_TOKENS] += num_tokens

    def sent_ns(self, step: int) -> int:
        """When a step was sent, by its number modulo `STEPS`."""
        return self._values[_FIRST_STEP + step]
