"""Owns the attention of a forward on a GPU: rotation, KV write and paged attention of all its tokens. Decode thread.

The counterpart of `worker.models.attention.AttentionPlan`, which is its reference. Where that takes q, k and v
already rotated, this takes the qkv product as it comes, and one kernel does what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from worker.device.choices import choices
from worker.forward import KVCache, StepTokens, check_prefix
from worker.kernels.paged_decode_attention import paged_decode_attention
from worker.kernels.prefill_attention import Segments, make_segments, prefill_attention
from worker.kernels.rotary_kv_write import rotary_kv_write


class FusedPlan:
    """What all layers of one forward share. Nothing here reads the device, so a forward of decode rows, or of chunks
    that are described on the device alone, can be captured.

    `rotations` are (N, 1, R/2) complex64 each, a rotation a token; a layer says which it uses. Raises ValueError when a chunk ends inside a
    bidirectional prefix that it also begins in.
    """

    def __init__(self, tokens: StepTokens, cache: KVCache, rotations: Sequence[Tensor]) -> None:
        self._cache = cache
        self._write_index = tokens.write_index
        self._positions = tokens.positions
        self._rotations = [torch.view_as_real(rotation.squeeze(1)) for rotation in rotations]
        self._decode = tokens.decode
        self._segments: Segments | None = None
        spans = []
        start = 0 if tokens.decode is None else tokens.decode.num_rows
        for chunk in tokens.prefills:
            check_prefix(chunk)
            spans.append((start, chunk.num_tokens, chunk.num_context, chunk.prefix_tokens))
            start += chunk.num_tokens
        if tokens.spans is not None and tokens.tables is not None:
            self._segments = Segments(tokens.spans, tokens.tables)
        elif spans:
            self._segments = make_segments(spans, [chunk.block_table for chunk in tokens.prefills])

    @cached_property
    def log_positions(self) -> Tensor:
        """(N, 1) fp32: ln(p + 1) of each token's position, for layers that scale by it."""
        return (self._positions.float() + 1.0).log_().unsqueeze(1)

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        num_heads: int,
        *,
        out: Tensor | None = None,
        qk_weight: Tensor | None = None,
        eps: float = 1e-6,
        window: int = 0,
        cap: float = 0.0,
        rotation: int = 0,
        gelu: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Write this layer's K and V and attend: qkv (N, (H + 2·KH)·D) → (N, H·D).

        q and k have the two of a rotated pair side by side. `out` may be part of a wider buffer; made in qkv's
        dtype if not given. `qk_weight` (H + KH, D) fp32: RMS norm of each head of q and k before the rotation.
        `gelu` as `rotary_kv_write` has it; `window`, `cap` and `rotation` as `worker.models.torch_attention.LayerAttention` has them.
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        turns = self._rotations[rotation]
        query = rotary_kv_write(
            qkv, turns, self._write_index, keys, values, num_heads, qk_weight=qk_weight, eps=eps, gelu=gelu
        )
        if out is None:
            out = torch.empty((qkv.shape[0], num_heads * keys.shape[3]), dtype=qkv.dtype, device=qkv.device)
        rows = self._decode
        if rows is not None:
            num = rows.num_rows
            paged_decode_attention(
                query[:num],
                keys,
                values,
                rows.block_tables,
                rows.lengths,
                rows.max_tokens,
                out=out[:num],
                window=window,
                cap=cap,
                arrivals=self._cache.arrivals if choices().last_joins else None,
            )
        if self._segments is not None:
            prefill_attention(query, keys, values, self._segments, out, window=window, cap=cap)
        return out


def can_fuse(head_dim: int) -> bool:
    """Whether the attention kernels take heads of this width: block shapes are powers of two."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0
