"""Owns full attention within crops by a CPU's compiled operations, in place of torch's. Decode thread.

Each crop is a segment of `segment_memory`. All threads of the team share the work, and matrix registers do it where there are some.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.models.segment_memory import SegmentMemory
from worker.native.operations import HEAD_DIMS, Operations, operations


class CropAttention:
    """Keys and values of one layer at a time, and what all layers of an encoding share. Build it once for (C, T, heads)."""

    def __init__(self, native: Operations, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._native, self._num_heads = native, num_heads
        self._head_dim, self._dtype = head_dim, dtype
        self._shape = (0, 0)

    def attend(self, qkv: Tensor, crops: int) -> Tensor:
        """(C·T, 3·H·D) products, all of q, then k, then v → (C·T, H·D)."""
        qkv = qkv.view(-1, qkv.shape[-1])
        shape = crops, qkv.shape[0] // crops
        if shape != self._shape:
            self._prepare(*shape)
        return self._memory.attend(qkv, self._rotation)

    def _prepare(self, crops: int, tokens: int) -> None:
        self._shape = crops, tokens
        lengths = [tokens] * crops
        self._memory = SegmentMemory(self._native, lengths, self._num_heads, self._head_dim, self._dtype)
        self._rotation = torch.empty(crops * tokens, 1, 0, dtype=torch.complex64)  # nothing is rotated


MOST_PADDING = 1.25
"""The factor by which heads may be widened with zeros to a width that compiled attention takes: 72 becomes 80."""


def padded_width(device: torch.device, head_dim: int, dtype: torch.dtype) -> int:
    """The width to keep heads at: their own, unless the compiled operations take only a slightly larger one."""
    native = operations(device)
    if native is None or native.can_attend(dtype, dtype, head_dim, 0):
        return head_dim
    wider = [width for width in HEAD_DIMS if head_dim < width <= MOST_PADDING * head_dim]
    return next((width for width in wider if native.can_attend(dtype, dtype, width, 0)), head_dim)


def crop_attention(
    device: torch.device, num_heads: int, head_dim: int, dtype: torch.dtype
) -> CropAttention | None:
    """None where the device has no compiled operations, or they do not take such heads."""
    native = operations(device)
    if native is None or not native.can_attend(dtype, dtype, head_dim, 0):
        return None
    return CropAttention(native, num_heads, head_dim, dtype)
