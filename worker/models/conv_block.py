"""Owns layers that mix tokens by a short gated convolution in attention's place. Decode thread.

LFM2's (Liquid AI 2025): of three products of the normed stream the first gates what is convolved, the second what comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.models.attention import AttentionPlan
from worker.models.dense_config import DenseConfig
from worker.models.dense_weights import take_block_norm, take_gated_mlp, take_scaled
from worker.models.linear import PackedLinear, Take, TakeWeight
from worker.native.stack import Layer

if TYPE_CHECKING:
    from worker.kernels.fused import FusedPlan


class ConvBlock:
    """One layer: a short convolution, then the MLP, each behind its norm and added to the residual stream."""

    def __init__(
        self, take: Take, take_weight: TakeWeight, name: str, sizes: DenseConfig, dtype: torch.dtype
    ) -> None:
        conv, names, dim = sizes.conv, sizes.norms, sizes.dim
        assert conv is not None and names.before_attention is not None and names.before_mlp is not None
        self._norm = take_block_norm(take, f"{name}.{names.before_attention}", sizes)
        self._before_mlp = take_block_norm(take, f"{name}.{names.before_mlp}", sizes)
        bias = take(f"{name}.conv.in_proj.bias", 3 * dim) if conv.bias else None
        self._in = PackedLinear(take_weight(f"{name}.conv.in_proj.weight", 3 * dim, dim), bias, dtype=dtype)
        weight = take(f"{name}.conv.conv.weight", dim, 1, conv.num_taps, dtype=torch.float32)
        self._weight = weight.squeeze(1).t().contiguous()
        self._bias = take(f"{name}.conv.conv.bias", dim, dtype=torch.float32) if conv.bias else None
        self._out = take_scaled(take, take_weight, sizes, dtype, f"{name}.conv.out_proj", dim, dim, conv.bias)
        self._mlp = take_gated_mlp(take, take_weight, f"{name}.mlp", sizes, dtype)

    def __call__(self, hidden: Tensor, plan: AttentionPlan, layer: int) -> Tensor:
        """See `decoder.Block`; `layer` counts among those that convolve."""
        before, behind, value = self._in(self._norm(hidden)).chunk(3, dim=-1)
        mixed = plan.convolve(layer, before * value, self._weight, self._bias)
        hidden = self._out.add((mixed * behind).to(hidden.dtype), hidden)
        return self._mlp.add(self._before_mlp(hidden), hidden)

    def fused(
        self, hidden: Tensor, gained: Tensor | None, plan: FusedPlan, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Refused: models with such layers run by torch's operations on a GPU (`Decoder.fuses`)."""
        raise RuntimeError("a GPU has no kernels of ours for layers that convolve")

    def native_layer(self) -> Layer | None:
        """None: the compiled call over all layers knows attention only."""
        return None
