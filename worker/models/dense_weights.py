"""Owns taking a dense decoder's tensors from its checkpoint and arranging them for few products. Decode thread, at load."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from worker.models.dense_config import DenseConfig
from worker.models.layers import GatedMlp, LayerNorm, RmsNorm, take_norm
from worker.models.linear import PackedLinear, Take, TakeWeight, together
from worker.models.rope import pair_order
from worker.native.quantised import Quantised


def as_saved(take: TakeWeight, sizes: DenseConfig) -> TakeWeight:
    """`take`, with what was saved in bf16 left so for a model of fp32 activations: for tables, and for products that are told
    the dtype of their inputs. An fp32 copy on the way is twice the weight."""
    return partial(take, as_saved=True) if sizes.dtype == torch.float32 else take


def take_words(take: Take, sizes: DenseConfig, name: str) -> Tensor:
    """The table of words (V, D), as it was saved where that is bf16."""
    as_it_is = {"as_saved": True} if sizes.dtype == torch.float32 else {}
    return take(name, sizes.vocab_size, sizes.dim, **as_it_is)


def take_block_norm(take: Take, name: str, sizes: DenseConfig) -> LayerNorm | RmsNorm:
    """The norm stored as `name`, of the kind that the settings name."""
    if sizes.layer_norm:
        return take_norm(take, name, sizes.dim, sizes.eps)
    if sizes.unit_offset:
        # Kept in fp32: 1 + w has more digits than bf16 does.
        return RmsNorm(take(f"{name}.weight", sizes.dim, dtype=torch.float32) + 1.0, sizes.eps)
    return RmsNorm(take(f"{name}.weight", sizes.dim), sizes.eps)


def take_qkv(
    take: Take, take_weight: TakeWeight, name: str, sizes: DenseConfig, dtype: torch.dtype
) -> PackedLinear:
    """q, k and v as one product, the dimensions of each q and k head in rotary pairs (see `pair_order`)."""
    widths = (sizes.q_dim, sizes.kv_dim, sizes.kv_dim)
    order = qkv_order(sizes)

    def parts(take: TakeWeight, kind: str, *inputs: int) -> list[Tensor | Quantised]:
        if sizes.fused_projections:
            return [take(f"{name}.qkv_proj.{kind}", sum(widths), *inputs)]
        names = zip(("q_proj", "k_proj", "v_proj"), widths, strict=True)
        return [take(f"{name}.{part}.{kind}", width, *inputs) for part, width in names]

    bias: Tensor | None = None
    if sizes.qkv_bias:
        stacked = together(parts(take, "bias"))
        assert isinstance(stacked, Tensor)
        bias = stacked[order.to(stacked.device)]
    weight = together(parts(as_saved(take_weight, sizes), "weight", sizes.dim))
    ordered = weight[order.to(weight.device)] if isinstance(weight, Tensor) else weight.ordered(order)
    return PackedLinear(ordered, bias, dtype=dtype)


def qkv_order(sizes: DenseConfig) -> Tensor:
    """Which row of q, k and v (all stacked) stands where: those of each q and k head in pairs, v's as they are."""
    pairs = pair_order(sizes.head_dim, sizes.rotary_dim)
    heads = torch.arange(sizes.num_heads + sizes.num_kv_heads).unsqueeze(1) * sizes.head_dim
    rotated = (heads + pairs).flatten()
    return torch.cat([rotated, torch.arange(len(rotated), len(rotated) + sizes.kv_dim)])


def take_gated_mlp(
    take: Take, take_weight: TakeWeight, name: str, sizes: DenseConfig, dtype: torch.dtype
) -> GatedMlp:
    """Gate and up as one product, and the one down from there."""

    def stacked(take: TakeWeight, kind: str, *inputs: int) -> Tensor | Quantised:
        if sizes.fused_projections:
            return take(f"{name}.gate_up_proj.{kind}", 2 * sizes.ff_dim, *inputs)
        return together(
            [take(f"{name}.{part}_proj.{kind}", sizes.ff_dim, *inputs) for part in ("gate", "up")]
        )

    bias = stacked(take, "bias") if sizes.mlp_bias else None
    assert bias is None or isinstance(bias, Tensor)
    weight = stacked(as_saved(take_weight, sizes), "weight", sizes.dim)
    gate_up = PackedLinear(weight, bias, gated=not sizes.gelu, dtype=dtype)
    down = take_scaled(
        take, take_weight, sizes, dtype, f"{name}.down_proj", sizes.dim, sizes.ff_dim, sizes.mlp_bias
    )
    return GatedMlp(gate_up, down, gelu=sizes.gelu)


def take_scaled(
    take: Take,
    take_weight: TakeWeight,
    sizes: DenseConfig,
    dtype: torch.dtype,
    name: str,
    outputs: int,
    inputs: int,
    biased: bool,
) -> PackedLinear:
    """A product that adds to the residual stream, its factor multiplied in before the weights are rounded."""

    def scaled(tensor: Tensor) -> Tensor:
        return (tensor.float() * sizes.residual_scale).to(dtype)

    bias = take(f"{name}.bias", outputs) if biased else None
    weight = as_saved(take_weight, sizes)(f"{name}.weight", outputs, inputs)
    if sizes.residual_scale != 1.0:
        bias = None if bias is None else scaled(bias)
        weight = scaled(weight) if isinstance(weight, Tensor) else weight.scaled(sizes.residual_scale)
    return PackedLinear(weight, bias, dtype=dtype)
