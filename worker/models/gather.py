"""Owns decode rows' keys and values laid out for one product, kept from step to step. CPUs only; decode thread.

Pages lie anywhere, and a product over them wants each row's tokens side by side. Gathering all of them in every layer
of every step costs more than the product itself; from one step to the next, though, most rows only grow by a token.
So what was gathered is kept, with the page each place was copied from and that page's version, and a step copies the
new tokens and the places that no longer hold what the block tables say.

Every write to a page goes through an `AttentionPlan`, which gives the page a new version. A place is good while page
and version both agree: whoever holds a page after it was given back and taken again sees another version.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.models.contract import DecodeRows, KVCache, StepTokens

MAX_BYTES = 512 << 20
_PAGES_STEP = 8


class GatherSpace:
    """One model's kept rows: per layer two tensors (rows, kv_heads, tokens, head_dim), grown on demand."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._cache: KVCache | None = None
        self._clock = 0
        self._num_rows = self._num_pages = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._forget()

    def _forget(self) -> None:
        """Hold nothing of any page."""
        shape = self._num_rows, self._num_pages
        self._held_pages = torch.full(shape, -1, dtype=torch.int64)
        self._held_versions = torch.zeros(shape, dtype=torch.int64)
        self._row_index = torch.arange(self._num_rows)

    def follow(self, tokens: StepTokens, cache: KVCache, num_pages: int) -> bool:
        """Take note of a step's writes, and of what its decode rows will read: `num_pages` of each block table.

        Call once a forward, before its layers. False when the rows cannot be held: the caller gathers itself.
        """
        if cache is not self._cache:
            self._cache = cache
            self._versions = torch.zeros(cache.keys[0].shape[0], dtype=torch.int64)
            self._num_rows = self._num_pages = 0
            self._forget()
        self._clock += 1
        rows = tokens.decode
        held = rows is not None and self._has_room(rows.num_rows, num_pages, cache)
        if rows is not None and held:
            self._plan(rows, tokens.write_index[: rows.num_rows], num_pages, cache)
        self._versions[tokens.write_index // cache.page_tokens] = self._clock
        self._versions[0] = 0  # padding: whatever stands there, nobody reads it
        if rows is not None and held:
            self._held_versions[self._row_index[: rows.num_rows], self._last_page] = self._clock
        return held

    def _has_room(self, num_rows: int, num_pages: int, cache: KVCache) -> bool:
        if num_rows <= self._num_rows and num_pages <= self._num_pages:
            return True
        # In powers of two and half as much again: rows join one by one, and contexts grow page by page.
        rows = max(self._num_rows, 1 << (num_rows - 1).bit_length())
        pages = self._num_pages
        if num_pages > pages:
            pages = -(-max(num_pages, pages * 3 // 2) // _PAGES_STEP) * _PAGES_STEP
        page_bytes = cache.keys[0][0].nbytes
        if 2 * len(cache.keys) * rows * pages * page_bytes > self._max_bytes:
            return False
        self._num_rows, self._num_pages = rows, pages
        _, page_tokens, kv_heads, head_dim = cache.keys[0].shape
        shape = rows, kv_heads, pages * page_tokens, head_dim
        self._keys.clear()
        self._values.clear()
        # Zeroed: what is masked out must still be finite.
        self._keys = [torch.zeros(shape, dtype=cache.keys[0].dtype) for _ in cache.keys]
        self._values = [torch.zeros(shape, dtype=cache.keys[0].dtype) for _ in cache.values]
        self._forget()
        return True

    def _plan(self, rows: DecodeRows, write_index: Tensor, num_pages: int, cache: KVCache) -> None:
        """Work out which lines of the kept rows the new tokens take, and which places must be copied anew."""
        num_rows, page_tokens = rows.num_rows, cache.page_tokens
        kv_heads = cache.keys[0].shape[2]
        positions = rows.lengths[:num_rows].long() - 1
        self._last_page = positions // page_tokens
        self._used = num_rows, num_pages * page_tokens
        heads = self._row_index[:num_rows, None] * kv_heads + torch.arange(kv_heads)
        self._new_lines = (heads * (self._num_pages * page_tokens) + positions[:, None]).view(-1)
        wanted = rows.block_tables[:num_rows, :num_pages].long()
        versions = self._versions[wanted]
        held_pages = self._held_pages[:num_rows, :num_pages]
        held_versions = self._held_versions[:num_rows, :num_pages]
        stale = (held_pages != wanted) | (held_versions != versions)
        self._stale_pages: Tensor | None = None
        if bool(stale.any()):
            row, column = stale.nonzero(as_tuple=True)
            self._stale_pages = wanted[row, column]
            self._stale_lines = (heads[row] * self._num_pages + column[:, None]).view(-1)
            held_pages.copy_(wanted)
            held_versions.copy_(versions)

    def take(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's (B, KH, L, D) keys and values, with the step's own: `key`, `value` (B, KH, D), which must
        stand in the cache already. B rows, and L tokens of which a row's own length are its; the rest is finite."""
        assert self._cache is not None
        num_rows, num_tokens = self._used
        out = []
        for kept, new, cached in (
            (self._keys[layer], key, self._cache.keys[layer]),
            (self._values[layer], value, self._cache.values[layer]),
        ):
            if self._stale_pages is not None:
                page_tokens, head_dim = self._cache.page_tokens, cached.shape[-1]
                pages = cached.index_select(0, self._stale_pages).transpose(1, 2)
                page_lines = kept.view(-1, page_tokens * head_dim)
                page_lines.index_copy_(0, self._stale_lines, pages.reshape(-1, page_tokens * head_dim))
            head_dim = kept.shape[-1]
            kept.view(-1, head_dim).index_copy_(0, self._new_lines, new.reshape(-1, head_dim))
            out.append(kept[:num_rows, :, :num_tokens])
        return out[0], out[1]
