"""Owns what normalises queries and keys between their product and the rotation. Decode thread.

The compiled attention and the GPU's kernels apply norms that use one weight for every head; the norms here change the
product before it reaches them.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.dense_config import DenseConfig, QkNorm
from worker.models.linear import Take
from worker.models.rope import pair_order


class ProductNorm(Protocol):
    """A norm of the qkv product (N, (H + 2·KH)·D), v left as it is → the same, in new memory."""

    def __call__(self, qkv: Tensor) -> Tensor: ...


class WidthNorm:
    """RMS norm over all heads of q together, and over those of k (OLMo 2)."""

    def __init__(self, take: Take, name: str, sizes: DenseConfig) -> None:
        order, self._eps = pair_order(sizes.head_dim, sizes.rotary_dim), sizes.eps
        self._widths = (sizes.q_dim, sizes.kv_dim, sizes.kv_dim)
        self._weights = [
            take(f"{name}.{part}_norm.weight", width, dtype=torch.float32)
            .view(-1, sizes.head_dim)[:, order]
            .reshape(width)
            for part, width in (("q", sizes.q_dim), ("k", sizes.kv_dim))
        ]

    def __call__(self, qkv: Tensor) -> Tensor:
        """See `ProductNorm`."""
        *both, value = qkv.split(self._widths, 1)
        normed = [
            F.rms_norm(part.float(), weight.shape, weight, self._eps).to(qkv.dtype)
            for part, weight in zip(both, self._weights, strict=True)
        ]
        return torch.cat([*normed, value], 1)


class HeadLayerNorm:
    """LayerNorm of each head of q and k by a weight of its own, without bias (StableLM 2)."""

    def __init__(self, take: Take, name: str, sizes: DenseConfig) -> None:
        order, self._eps, self._head_dim = (
            pair_order(sizes.head_dim, sizes.rotary_dim),
            sizes.eps,
            sizes.head_dim,
        )
        self._rotated = sizes.q_dim + sizes.kv_dim
        weights = [
            take(f"{name}.{part}_layernorm.norms.{head}.weight", sizes.head_dim, dtype=torch.float32)[order]
            for part, heads in (("q", sizes.num_heads), ("k", sizes.num_kv_heads))
            for head in range(heads)
        ]
        self._weight = torch.stack(weights)

    def __call__(self, qkv: Tensor) -> Tensor:
        """See `ProductNorm`."""
        both, value = qkv[:, : self._rotated], qkv[:, self._rotated :]
        heads = both.float().reshape(-1, *self._weight.shape)
        normed = F.layer_norm(heads, (self._head_dim,), None, None, self._eps) * self._weight
        return torch.cat([normed.to(qkv.dtype).flatten(1), value], 1)


def head_weights(take: Take, name: str, sizes: DenseConfig) -> Tensor | None:
    """(H + KH, D) fp32 weights of norms of each head, one for all of q and one for all of k (Qwen 3, Gemma 3)."""
    if sizes.qk_norm is not QkNorm.HEAD:
        return None
    order = pair_order(sizes.head_dim, sizes.rotary_dim)
    weights = []
    for part, heads in (("q", sizes.num_heads), ("k", sizes.num_kv_heads)):
        weight = take(f"{name}.{part}_norm.weight", sizes.head_dim, dtype=torch.float32)[order]
        weights.append((weight + sizes.unit_offset).expand(heads, -1))
    return torch.cat(weights)


def product_norm(take: Take, name: str, sizes: DenseConfig) -> ProductNorm | None:
    """The norm that changes the product, if these settings have one."""
    if sizes.qk_norm is QkNorm.WIDTH:
        return WidthNorm(take, name, sizes)
    return HeadLayerNorm(take, name, sizes) if sizes.qk_norm is QkNorm.LAYER else None
