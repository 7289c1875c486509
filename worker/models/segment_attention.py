"""Owns rotated attention within segments of one picture's tokens, by compiled operations or by torch. Decode thread.

A segment is a window of the picture or all of it: its tokens see all of each other. Compiled operations attend in
`segment_memory`, as for crops of one size (`crop_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.segment_memory import SegmentMemory
from worker.models.vision_tower import attention_backend
from worker.native.operations import operations


class SegmentAttention:
    """Segments (lengths, in the order of the tokens) of one encoding, for layers with `num_heads` heads."""

    def __init__(
        self, lengths: Sequence[int], rotation: Tensor, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        """`rotation` (T, 1, head_dim / 2) complex64."""
        self._lengths, self._rotation = lengths, rotation
        self._num_heads, self._head_dim = num_heads, head_dim
        native = operations(rotation.device)
        self._memory: SegmentMemory | None = None
        if native is not None and native.can_attend(dtype, dtype, head_dim, head_dim):
            self._memory = SegmentMemory(native, lengths, num_heads, head_dim, dtype)
        elif len(lengths) > 1:
            self._groups = _by_length(lengths, rotation.device)

    def attend(self, qkv: Tensor) -> Tensor:
        """(T, 3·H·D) products, all of q, then k, then v, rotated pairs side by side → (T, H·D)."""
        if self._memory is not None:
            return self._memory.attend(qkv.contiguous(), self._rotation)
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
