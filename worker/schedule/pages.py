"""Owns the accounting of KV pages: who holds which, how often, and what is free. Pure; decode thread.

Page 0 is never handed out: padding rows of captured graphs write there.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf


class PagePool:
    """A free list over `num_pages` pages, each counted by its holders.

    A page is *allocated* while its count is above zero, *cached* while only the prefix cache remembers it
    (count zero, contents kept), and *free* otherwise. I7: free + allocated + cached = total, always.
    """

    __slots__ = ("_cached", "_counts", "_free", "num_pages", "page_tokens")

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}; page 0 is padding, so at least 2 are needed")
        if page_tokens < 1:
            raise ValueError(f"page_tokens is {page_tokens}; a safe value is 16")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages - 1, 0, -1))
        self._counts = [0] * num_pages
        self._cached: set[int] = set()

    @property
    def total(self) -> int:
        """Pages that can ever be handed out."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_allocated(self) -> int:
        return self.total - len(self._free) - len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold `num_tokens` positions."""
        return -(-num_tokens // self.page_tokens)

    def take(self) -> int:
        """Hand out one free page, count 1. Raises IndexError when none is free."""
        page = self._free.pop()
        self._counts[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of an allocated or cached page."""
        assert self._counts[page] > 0 or page in self._cached, f"page {page} is free"
        self._cached.discard(page)
        self._counts[page] += 1

    def drop(self, page: int, *, keep: bool = False) -> None:
        """One holder fewer. At zero the page is free, or stays cached where `keep` says so."""
        count = self._counts[page] - 1
        assert count >= 0, f"page {page} dropped more often than held"
        self._counts[page] = count
        if count == 0:
            if keep:
                self._cached.add(page)
            else:
                self._free.append(page)

    def drop_all(self, pages: SequenceOf[int]) -> None:
        """`drop` each, last page first, so that a prefix outlives its continuation in the free list."""
        for page in reversed(pages):
            self.drop(page)

    def evict(self, page: int) -> None:
        """Make a cached page free: its contents are forgotten."""
        self._cached.remove(page)
        self._free.append(page)

    def count(self, page: int) -> int:
        """How many hold the page."""
        return self._counts[page]

    def check(self) -> None:
        """Raise AssertionError unless I7 holds and every page is in exactly one state."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        allocated = {page for page in range(1, self.num_pages) if self._counts[page] > 0}
        assert not free & allocated, f"free and allocated: {sorted(free & allocated)[:8]}"
        assert not free & self._cached, f"free and cached: {sorted(free & self._cached)[:8]}"
        assert not allocated & self._cached, f"allocated and cached: {sorted(allocated & self._cached)[:8]}"
        assert len(free) + len(allocated) + len(self._cached) == self.total, "pages lost"
        assert self._counts[0] == 0, "page 0 was handed out"
