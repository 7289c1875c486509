"""Owns which full KV pages are remembered by content, and which of them to forget first. Pure; decode thread.

A page's key is a hash chain over everything its contents depend on: tenant, every earlier token, the digests of
pictures and the moments of frames, coordinates given with it, and as a whole each block that attends both ways. Pages enter only after the step that wrote them was
committed without fault, so a cancelled or failed row never leaves bad pages behind.
"""

from __future__ import annotations

from array import array
from collections.abc import Container
from hashlib import blake2b
from typing import Final

from worker.schedule.kv_events import KvEvent, KvEvents
from worker.schedule.pages import PagePool
from worker.schedule.sequence import Sequence

KEY_BYTES: Final = 16


class PrefixCache:
    """Content-addressed pages over a `PagePool`, forgotten by least recent use, deepest page first.

    `events` is told of every page that is remembered or forgotten.
    """

    __slots__ = ("_by_key", "_events", "_idle", "_key_of", "_pool", "num_hit_tokens", "num_query_tokens")

    def __init__(self, pool: PagePool, events: KvEvents | None = None) -> None:
        self._pool = pool
        self._events = events
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # cached pages nobody holds, least recently used first
        self.num_query_tokens = 0
        self.num_hit_tokens = 0

    def match(self, seq: Sequence) -> int:
        """Hold the longest remembered run of `seq`'s full pages; returns how many positions it covers.

        At least one known position is left to compute, because the prefill must give the last position's logits.
        """
        assert not seq.pages
        page_tokens = self._pool.page_tokens
        self.num_query_tokens += len(seq.tokens)
        for number in range((len(seq.tokens) - 1) // page_tokens):
            page = self._by_key.get(self._key(seq, number))
            if page is None:
                break
            self._pool.hold(page)
            self._idle.pop(page, None)
            seq.pages.append(page)
        num_tokens = len(seq.pages) * page_tokens
        self.num_hit_tokens += num_tokens
        return num_tokens

    def num_here(self, seq: Sequence) -> int:
        """How many pages `match` would find now. They become the last to be forgotten."""
        num = 0
        while num < (len(seq.tokens) - 1) // self._pool.page_tokens and self._key(seq, num) in self._by_key:
            num += 1
        self.touch(seq, num)
        return num

    def has(self, seq: Sequence, number: int) -> bool:
        """Whether a page of a sequence is remembered."""
        return self._key(seq, number) in self._by_key

    def touch(self, seq: Sequence, num_pages: int) -> None:
        """The first pages of a sequence are needed soon: those that nobody holds become the last to be forgotten, the deepest
        of them first."""
        for number in range(num_pages - 1, -1, -1):
            page = self._by_key.get(self._key(seq, number), 0)
            if page in self._idle:
                del self._idle[page]
                self._idle[page] = None

    def evict_other(self, own: Container[bytes]) -> bool:
        """Free the page that is to be forgotten next, unless its key is one of these. Returns whether it did."""
        oldest = next(iter(self._idle), 0)
        return oldest > 0 and self._key_of[oldest] not in own and self.evict(1) == 1

    def adopt(self, seq: Sequence, number: int, page: int) -> None:
        """Remember `page`, which was taken from the pool and filled with a page of `seq` that another worker computed; the
        page before it is remembered. Nobody holds it from here on: it is forgotten like any other."""
        key = self._key(seq, number)
        assert key not in self._by_key and (not number or self.has(seq, number - 1))
        self._by_key[key] = page
        self._key_of[page] = key
        self._pool.drop(page, keep=True)
        self._idle[page] = None
        if self._events is not None:
            self._events.on_stored(seq, [number], self._pool.page_tokens, _root(seq))

    def discard(self, seq: Sequence, first: int, end: int) -> None:
        """Forget those of `seq`'s pages [first, end) that nobody holds: their contents are not to be trusted."""
        keys = []
        for number in range(end - 1, first - 1, -1):
            page = self._by_key.get(self._key(seq, number), 0)
            if page in self._idle:
                del self._idle[page]
                self._pool.evict(page)
                keys.append(self._key_of.pop(page))
        self._drop_keys(keys)

    def insert(self, seq: Sequence, num_tokens: int) -> None:
        """Remember the full pages among `seq`'s first `num_tokens` positions, all committed."""
        if seq.is_spatial:  # generated coordinates are embedded by value, which token ids do not determine
            num_tokens = min(num_tokens, seq.num_prompt)
        stored: list[int] = []
        for number in range(num_tokens // self._pool.page_tokens):
            page = seq.pages[number]
            if page in self._key_of:
                continue
            key = self._key(seq, number)
            if key not in self._by_key:
                self._by_key[key] = page
                self._key_of[page] = key
                stored.append(number)
        if stored and self._events is not None:
            self._events.on_stored(seq, stored, self._pool.page_tokens, _root(seq))

    def release(self, seq: Sequence) -> None:
        """Drop all of `seq`'s pages; remembered ones stay cached."""
        for page in reversed(seq.pages):
            keep = page in self._key_of
            self._pool.drop(page, keep=keep)
            if keep and self._pool.count(page) == 0:
                self._idle[page] = None
        seq.pages = []  # a new list: slots know a row's table by it (worker.step.staging)

    def forget(self, seq: Sequence) -> None:
        """Take `seq`'s own pages out of the cache: their contents are not to be trusted."""
        keys = [key for page in seq.pages if (key := self._key_of.pop(page, None)) is not None]
        self._drop_keys(keys)

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` idle pages, least recently used first. Returns how many it freed."""
        victims = list(self._idle)[:num_pages]
        for page in victims:
            del self._idle[page]
            self._pool.evict(page)
        self._drop_keys([self._key_of.pop(page) for page in victims])
        return len(victims)

    def take_events(self) -> list[KvEvent]:
        """What was remembered and forgotten since the last call, where that is collected."""
        return self._events.take() if self._events else []

    @property
    def keys(self) -> frozenset[bytes]:
        """The keys of all pages that are remembered."""
        return frozenset(self._by_key)

    def check(self) -> None:
        """Raise AssertionError unless the maps agree with each other and with the pool."""
        assert len(self._by_key) == len(self._key_of)
        assert all(self._key_of[page] == key for key, page in self._by_key.items())
        assert len(self._idle) == self._pool.num_cached
        assert all(page in self._key_of and self._pool.count(page) == 0 for page in self._idle)

    def _drop_keys(self, keys: list[bytes]) -> None:
        for key in keys:
            del self._by_key[key]
        if self._events is not None:
            self._events.on_removed(keys)

    def _key(self, seq: Sequence, number: int) -> bytes:
        return page_keys(seq, self._pool.page_tokens, number + 1)[number]


def page_keys(seq: Sequence, page_tokens: int, num_pages: int) -> list[bytes]:
    """What stands for each of a sequence's first full pages, as many as asked for at least: the same wherever they are computed."""
    keys = seq.page_keys
    while len(keys) < num_pages:
        start = len(keys) * page_tokens
        end = start + page_tokens
        digest = blake2b(keys[-1] if keys else _root(seq), digest_size=KEY_BYTES)
        digest.update(array("i", seq.tokens[start:end]).tobytes())
        for picture in seq.pictures:
            if picture.position < end and start < picture.end:
                digest.update(picture.page_key)
        for index, values in seq.values.items():
            place = seq.num_prompt + index
            if index < 0 and start <= place < end:  # given with the prompt
                digest.update(array("d", (place, *values)).tobytes())
        for first, stop in seq.blocks:
            if first < end and start < stop:
                digest.update(_block(seq, first, stop))
        keys.append(digest.digest())
    return keys


def _root(seq: Sequence) -> bytes:
    """What every page of a sequence depends on: its tenant."""
    digest = blake2b(digest_size=16)
    digest.update(len(seq.tenant.encode()).to_bytes(4, "little") + seq.tenant.encode())
    return digest.digest()


def _block(seq: Sequence, first: int, stop: int) -> bytes:
    """What every page of a block that attends both ways depends on: all of it."""
    digest = blake2b(array("i", [first, stop]).tobytes(), digest_size=16)
    digest.update(array("i", seq.tokens[first:stop]).tobytes())
    for picture in seq.pictures:
        if picture.position < stop and first < picture.end:
            digest.update(picture.page_key)
    return digest.digest()
