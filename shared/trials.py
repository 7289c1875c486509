"""Owns trying a compiled grammar before an answer depends on it: walks at random through what it allows. Confined processes.

Limits that a mask exceeds are found here and not in the middle of an answer. What the grammar forces (a long constant) is
skipped at once, and texts and lists end soon, so that few steps see much of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, Protocol

STEPS: Final = 96
_ENDS: Final = (b'"', b"}", b"]", b",", b'"}', b'",', b":")


class Matcher(Protocol):
    """What is needed of llguidance's matcher."""

    def compute_bitmask(self) -> bytes:
        """The ids that may come next, as bits."""

    def compute_ff_bytes(self) -> bytes:
        """What has to come next."""

    def try_consume_tokens(self, tokens: list[int]) -> int:
        """Take tokens; how many of them were allowed."""

    def consume_token(self, sampled_token: int) -> bool:
        """Take a token."""

    def is_error(self) -> bool:
        """Whether a limit was exceeded."""

    def reset(self) -> bool:
        """Begin anew."""


class Trial:
    """One grammar's walks."""

    def __init__(
        self,
        matcher: Matcher,
        end_ids: Sequence[int],
        tokenize: Callable[[bytes], list[int]],
        *,
        seed: int = 0,
    ) -> None:
        self._matcher = matcher
        self._end_ids = frozenset(end_ids)
        self._tokenize = tokenize
        self._rng = random.Random(seed)
        self._closing = [ids[0] for text in _ENDS if len(ids := tokenize(text)) == 1]

    def run(self, steps: int = STEPS) -> None:
        """Take so many steps, in as many walks as that makes; the matcher's error says what was exceeded."""
        matcher = self._matcher
        for _ in range(steps):
            mask = matcher.compute_bitmask()
            if matcher.is_error():
                return
            token_id = self._choose(mask)
            if token_id is None:
                if not matcher.reset():
                    return
                continue
            if not matcher.consume_token(token_id):
                return
            forced = matcher.compute_ff_bytes()
            if forced:
                matcher.try_consume_tokens(self._tokenize(forced))
            if matcher.is_error():
                return
        matcher.reset()

    def _choose(self, mask: bytes) -> int | None:
        """An allowed id, often one that ends a text or a list; None where only an end may follow, or is drawn."""
        rng = self._rng
        if rng.random() < 0.4:
            closing = [i for i in self._closing if mask[i >> 3] >> (i & 7) & 1]
            if closing:
                return rng.choice(closing)
        start = rng.randrange(len(mask))
        turned = mask[start:] + mask[:start]
        for _ in range(2):
            rest = turned.lstrip(b"\0")
            if not rest:
                return None
            place = (start + len(turned) - len(rest)) % len(mask)
            bits = [place * 8 + bit for bit in range(8) if rest[0] >> bit & 1]
            allowed = [i for i in bits if i not in self._end_ids]
            if allowed:
                return rng.choice(allowed)
            turned, start = rest[1:], place + 1
            if not turned:
                return None
        return None
