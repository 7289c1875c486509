"""Owns rotated attention within segments of one picture's tokens, by compiled operations or by torch. Decode thread.

A segment is a window of the picture or all of it: its tokens see all of each other. On a CPU the compiled operations are those
of a prompt's chunk, as for crops of one size (`crop_attention`): each segment is a sequence of one page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.vision_tower import attention_backend
from worker.native.operations import Operations, operations
from worker.native.token_rows import TokenRows


class SegmentAttention:
    """Segments (lengths, in the order of the tokens) of one encoding, for layers with `num_heads` heads."""

    def __init__(
        self, lengths: Sequence[int], rotation: Tensor, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        """`rotation` (T, 1, head_dim / 2) complex64."""
        self._lengths, self._rotation = lengths, rotation
        self._num_heads, self._head_dim = num_heads, head_dim
        native = operations(rotation.device)
        self._native = (
            native if native is not None and native.can_attend(dtype, dtype, head_dim, head_dim) else None
        )
        if self._native is not None:
            self._prepare(dtype)
        elif len(lengths) > 1:
            self._groups = _by_length(lengths, rotation.device)

    def attend(self, qkv: Tensor) -> Tensor:
        """(T, 3·H·D) products, all of q, then k, then v, rotated pairs side by side → (T, H·D)."""
        if self._native is not None:
            return self._by_native(self._native, qkv)
        split = qkv.view(len(qkv), 3, self._num_heads, self._head_dim)
        turned = torch.view_as_complex(split[:, :2].float().unflatten(-1, (-1, 2))) * self._rotation[:, None]
        query, key = torch.view_as_real(turned).flatten(-2).to(qkv.dtype).unbind(1)
        value = split[:, 2]
        if len(self._lengths) == 1:
            return _full(query[None], key[None], value[None])[0]
        out = torch.empty_like(query.flatten(1))
        for index in self._groups:  # (segments, tokens of each)
            out[index] = _full(query[index], key[index], value[index])
        return out

    def _by_native(self, native: Operations, qkv: Tensor) -> Tensor:
        out = qkv.new_empty(len(qkv), self._num_heads * self._head_dim)
        native.attend(
            qkv.contiguous(),
            self._keys,
            self._values,
            self._write_index,
            self._rows,
            self._rotation,
            self._num_heads,
            out,
        )
        return out

    def _prepare(self, dtype: torch.dtype) -> None:
        num, longest = len(self._lengths), max(self._lengths)
        lengths = np.asarray(self._lengths, np.int64)
        self._keys = torch.empty(num, longest, self._num_heads, self._head_dim, dtype=dtype)
        self._values = torch.empty_like(self._keys)
        lines = np.concatenate([i * longest + np.arange(length) for i, length in enumerate(self._lengths)])
        self._write_index = torch.from_numpy(lines)
        self._tables = torch.arange(num, dtype=torch.int32)
        runs = np.zeros((num, 4), np.int64)
        runs[:, 0] = lengths
        runs[:, 1] = self._tables.data_ptr() + self._tables.element_size() * np.arange(num)
        runs[:, 3] = 1
        seen = torch.from_numpy(np.repeat(lengths, lengths).astype(np.int32))
        self._rows = TokenRows(len(seen), seen, None, torch.from_numpy(runs))


def _full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(S, T, H, D) each → (S, T, H·D)."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    with attention_backend(query.device):
        mixed = F.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(1, 2).flatten(2)


def _by_length(lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Indexes (segments, tokens) of the segments of each length, so that a call attends to many of them."""
    starts = np.cumsum([0, *lengths[:-1]])
    groups = []
    for length in sorted(set(lengths)):
        first = np.array([start for start, own in zip(starts, lengths, strict=True) if own == length])
        groups.append(torch.from_numpy(first[:, None] + np.arange(length)).to(device))
    return groups
