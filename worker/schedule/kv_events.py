"""Owns what the prefix cache has remembered and forgotten since it was last asked, as others are told of it. Pure; decode thread.

A router that knows which worker holds which prefix sends a request where most of its prompt is cached. The events are those that
vLLM publishes (its `kv_events`): blocks by their hashes, each hash over everything the block's contents depend on.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

from worker.schedule.sequence import IMAGE_TOKEN, Sequence

HASH_BYTES = 8
"""Of a page's key: hashes travel as unsigned 64-bit numbers, which every reader takes."""

PICTURE_TOKEN_ID = 0
"""Stands for a picture's positions, which have no token here: readers take ids as unsigned numbers."""

ExtraKeys = tuple[str, ...]
"""What one block's hash covers besides token ids: the tenant's salt (first block), pictures, coordinates."""


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Consecutive blocks that are cached from now on."""

    hashes: list[int]
    parent: int | None  # the hash of the block before the first; None: a prompt begins here
    token_ids: list[int]  # of all blocks, `block_tokens` each
    block_tokens: int
    extra_keys: list[ExtraKeys | None]  # a block's, where its hash covers more than token ids


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks that are not cached any more."""

    hashes: list[int]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing is cached: a worker begins."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEvents:
    """Collects events in order; `take` hands them over."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: list[KvEvent] = [AllBlocksCleared()]

    def __bool__(self) -> bool:
        return bool(self._events)

    def take(self) -> list[KvEvent]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def on_stored(self, seq: Sequence, numbers: Sequence_[int], page_tokens: int, salt: bytes) -> None:
        """Pages `numbers` (ascending) of `seq`, whose keys are known, are remembered. `salt`: what its tenant adds."""
        start = 0
        for place in range(1, len(numbers) + 1):
            if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
                self._store(seq, numbers[start], numbers[place - 1] + 1, page_tokens, salt)
                start = place

    def on_removed(self, keys: Iterable[bytes]) -> None:
        """The pages of these keys are forgotten."""
        hashes = [hash_of(key) for key in keys]
        if hashes:
            self._events.append(BlockRemoved(hashes))

    def _store(self, seq: Sequence, first: int, end: int, page_tokens: int, salt: bytes) -> None:
        tokens = seq.tokens[first * page_tokens : end * page_tokens]
        if seq.pictures:
            tokens = [PICTURE_TOKEN_ID if token == IMAGE_TOKEN else token for token in tokens]
        keys = seq.page_keys
        self._events.append(
            BlockStored(
                [hash_of(keys[number]) for number in range(first, end)],
                hash_of(keys[first - 1]) if first else None,
                tokens,
                page_tokens,
                [_extra_keys(seq, number, page_tokens, salt) for number in range(first, end)],
            )
        )


def hash_of(key: bytes) -> int:
    """A page's hash, as others know it."""
    return int.from_bytes(key[-HASH_BYTES:], "big")


def _extra_keys(seq: Sequence, number: int, page_tokens: int, salt: bytes) -> ExtraKeys | None:
    start, end = number * page_tokens, (number + 1) * page_tokens
    keys = [one.page_key.hex() for one in seq.pictures if one.position < end and start < one.end]
    if seq.values:
        given = [(seq.num_prompt + index, value) for index, value in seq.values.items() if index < 0]
        keys += [f"{place - start}={value}" for place, value in given if start <= place < end]
    if not number and seq.tenant:
        keys.append(salt.hex())
    return tuple(keys) or None
