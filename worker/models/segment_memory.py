"""Owns the pages in which segments of tokens attend within themselves by a CPU's compiled operations. Decode thread.

The operations are those of a prompt's chunk: each segment is a sequence of one page, whose tokens see all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.native.operations import Operations
from worker.native.token_rows import TokenRows


class SegmentMemory:
    """Keys and values of one layer at a time, for segments of these lengths in the order of the tokens."""

    def __init__(
        self, native: Operations, lengths: Sequence[int], num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self._native, self._num_heads, self._width = native, num_heads, num_heads * head_dim
        num, longest = len(lengths), max(lengths)
        counts = np.asarray(lengths, np.int64)
        self._keys = torch.empty(num, longest, num_heads, head_dim, dtype=dtype)
        self._values = torch.empty_like(self._keys)
        lines = np.concatenate([i * longest + np.arange(length) for i, length in enumerate(lengths)])
        self._write_index = torch.from_numpy(lines)
        self._tables = torch.arange(num, dtype=torch.int32)
        runs = np.zeros((num, 4), np.int64)
        runs[:, 0] = counts
        runs[:, 1] = self._tables.data_ptr() + self._tables.element_size() * np.arange(num)
        runs[:, 3] = 1
        seen = torch.from_numpy(np.repeat(counts, counts).astype(np.int32))
        self._rows = TokenRows(len(seen), seen, None, torch.from_numpy(runs))

    def attend(self, qkv: Tensor, rotation: Tensor) -> Tensor:
        """(T, 3·H·D) contiguous products, all of q, then k, then v; `rotation` (T, 1, R/2) complex64 → (T, H·D)."""
        out = qkv.new_empty(len(qkv), self._width)
        self._native.attend(
            qkv, self._keys, self._values, self._write_index, self._rows, rotation, self._num_heads, out
        )
        return out
