"""Owns the blocks of dense decoders: grouped-head attention and a gated MLP a layer, by a family's settings. Decode thread.

A decode step of a small model on a CPU costs as much in operator calls as in arithmetic, so weights are arranged at load
for few calls: q, k and v are one product, as are gate and up; a rotary pair is one complex number; products add the
residual, and factors of sums are multiplied into weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.protocol import ModelCard
from worker.formats.source import ProgressReport, Rename, Source, Target
from worker.models.attention import AttentionPlan
from worker.models.decoder import Decoder
from worker.models.dense_config import DenseConfig
from worker.models.head import Head
from worker.models.layers import (
    GatedMlp,
    LayerNorm,
    PackedLinear,
    RmsNorm,
    Take,
    TakeWeight,
    take_norm,
    together,
)
from worker.models.qk_norm import head_weights, product_norm
from worker.models.rope import pair_order, rotation_table
from worker.models.taking import Taker
from worker.native.quantised import Quantised
from worker.native.stack import GatedLayer

if TYPE_CHECKING:
    from worker.kernels.fused import FusedPlan

_COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_BARE = re.compile(r"(embed_tokens|layers|norm)\.")  # names in a folder that was saved without its head


class Dense(Decoder):
    """A loaded dense decoder; implements `contract.Model`. It reads text only. Any float dtype works."""

    def __init__(
        self,
        sizes: DenseConfig,
        card: ModelCard,
        take: Take,
        device: torch.device,
        take_weight: TakeWeight | None = None,
    ) -> None:
        """`take_weight` hands out weights of products as the file holds them, where products read that; None: as `take`."""
        self.sizes = sizes
        take_weight = take_weight or take
        embedding, table = "model.embed_tokens.weight", (sizes.vocab_size, sizes.dim)
        weight = _as_saved(take_weight, sizes)(embedding if sizes.tied else "lm_head.weight", *table)
        if sizes.tied and isinstance(weight, Tensor):
            words = weight
        else:
            words = take(embedding, *table, **({"as_saved": True} if sizes.dtype == torch.float32 else {}))
        dtype = sizes.dtype or words.dtype
        head = Head(weight, scale=sizes.logit_scale, cap=sizes.logit_cap, dtype=dtype)
        del weight  # packed: what was read goes before more is
        layers = range(sizes.num_layers)
        blocks = [_Block(take, take_weight, f"model.layers.{i}", sizes, i, dtype) for i in layers]
        norm = _take_norm(take, "model.norm", sizes)
        # q and k are rotated by numbers of this length, so scores are scaled by its square, exactly and on every path.
        length = sizes.score_scale**0.5
        super().__init__(
            card,
            words,
            blocks,
            norm,
            head,
            [rotation_table(r, sizes.rotary_dim, sizes.context_tokens, device, length) for r in sizes.ropes],
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            embedding_scale=sizes.embedding_scale,
            biased=sizes.qkv_bias or sizes.out_bias or sizes.mlp_bias,
            dtype=dtype,
        )


class _Block:
    """One layer: attention, then the MLP, each between the norms that the settings name, added to the residual
    stream; or both side by side behind one norm."""

    def __init__(
        self,
        take: Take,
        take_weight: TakeWeight,
        name: str,
        sizes: DenseConfig,
        index: int,
        dtype: torch.dtype,
    ) -> None:
        names, attention = sizes.norms, f"{name}.self_attn"
        self._kind = sizes.layers[index]
        self._parallel = sizes.parallel
        self._head_dim, self._num_heads = sizes.head_dim, sizes.num_heads
        self._num_rotated = sizes.num_heads + sizes.num_kv_heads
        self._eps = sizes.eps

        def norm(part: str | None) -> LayerNorm | RmsNorm | None:
            return None if part is None else _take_norm(take, f"{name}.{part}", sizes)

        self._before_attention, self._after_attention = (
            norm(names.before_attention),
            norm(names.after_attention),
        )
        self._before_mlp, self._after_mlp = norm(names.before_mlp), norm(names.after_mlp)
        self._qkv = _take_qkv(take, take_weight, attention, sizes, dtype)
        self._qk_weight = head_weights(take, attention, sizes)
        self._head_norm = RmsNorm(torch.ones(sizes.head_dim, device=self._qkv.device), sizes.eps)
        self._product_norm = product_norm(take, attention, sizes)
        scaled = partial(_take_scaled, take, take_weight, sizes, dtype)
        self._out = scaled(f"{attention}.o_proj", sizes.dim, sizes.q_dim, sizes.out_bias)
        gate_up = _take_gate_up(take, take_weight, f"{name}.mlp", sizes, dtype)
        down = scaled(f"{name}.mlp.down_proj", sizes.dim, sizes.ff_dim, sizes.mlp_bias)
        self._mlp = GatedMlp(gate_up, down, gelu=sizes.gelu)

    def __call__(self, hidden: Tensor, plan: AttentionPlan, layer: int) -> Tensor:
        """See `decoder.Block`."""
        normed = hidden if self._before_attention is None else self._before_attention(hidden)
        mixed = plan.attend_product(
            layer,
            self._product(normed),
            self._num_heads,
            self._split,
            qk_weight=self._qk_weight,
            eps=self._eps,
            kind=self._kind,
        )
        if self._after_attention is None:
            hidden = self._out.add(mixed, hidden)
        else:
            hidden = hidden + self._after_attention(self._out(mixed))
        if not self._parallel:
            normed = hidden if self._before_mlp is None else self._before_mlp(hidden)
        if self._after_mlp is None:
            return self._mlp.add(normed, hidden)
        return hidden + self._after_mlp(self._mlp(normed))

    def _product(self, normed: Tensor, *, fused: bool = False) -> Tensor:
        qkv = self._qkv.fused(normed) if fused else self._qkv(normed)
        return qkv if self._product_norm is None else self._product_norm(qkv)

    def native_layer(self) -> GatedLayer | None:
        """See `decoder.Block`: two RMS norms before, none after, the first rotation, a SiLU gate."""
        first, second = self._before_attention, self._before_mlp
        qkv, out, gate_up, down = (
            x.native for x in (self._qkv, self._out, self._mlp.gate_up, self._mlp.down)
        )
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        if (
            not isinstance(first, RmsNorm)
            or not isinstance(second, RmsNorm)
            or first.weight.dtype != self._qkv.dtype
        ):
            return None
        plain = self._after_attention is None and self._after_mlp is None and self._product_norm is None
        if not plain or self._kind.rotation or not self._mlp.gate_up.gates_native:
            return None
        return GatedLayer(
            attention_norm=first.weight.data_ptr(),
            qkv=qkv,
            qk_weight=None if self._qk_weight is None else self._qk_weight.data_ptr(),
            out=out,
            mlp_norm=second.weight.data_ptr(),
            gate_up=gate_up,
            down=down,
            window=self._kind.window,
            cap=self._kind.cap,
        )

    def _split(self, qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `attention.Split`. All in fp32."""
        num_heads, num_rotated, head_dim = self._num_heads, self._num_rotated, self._head_dim
        # Only finite values reach the cache, since a NaN in a page would spoil the page's next owner even where it is masked.
        # The faulty row is found by its output, which keeps the NaN through the residual stream.
        heads = qkv.float().nan_to_num_(0.0, 0.0, 0.0).view(-1, 2 * num_rotated - num_heads, head_dim)
        rotated, value = heads.split((num_rotated, num_rotated - num_heads), 1)
        if self._qk_weight is not None:
            rotated = self._head_norm(rotated) * self._qk_weight
        # Rotary embedding in fp32 and in place: one complex product over the heads of q and k.
        pairs = rotated[..., : 2 * rotation.shape[-1]].view(-1, num_rotated, rotation.shape[-1], 2)
        torch.view_as_complex(pairs).mul_(rotation)
        query, key = rotated.split((num_heads, num_rotated - num_heads), 1)
        return query, key, value

    def fused(
        self, hidden: Tensor, gained: Tensor | None, plan: FusedPlan, layer: int
    ) -> tuple[Tensor, Tensor]:
        """See `decoder.Block`."""
        hidden, normed = _add_norm(self._before_attention, hidden, gained)
        kind = self._kind
        mixed = plan.attend(
            layer,
            self._product(normed, fused=True),
            self._num_heads,
            qk_weight=self._qk_weight,
            eps=self._eps,
            window=kind.window,
            cap=kind.cap,
            rotation=kind.rotation,
        )
        gained = self._out.fused(mixed)
        if self._after_attention is not None:
            gained = self._after_attention.fused(gained, None)[1]
        if self._parallel:
            return hidden, self._mlp.fused(normed, gained)
        hidden, normed = _add_norm(self._before_mlp, hidden, gained)
        gained = self._mlp.fused(normed)
        if self._after_mlp is not None:
            gained = self._after_mlp.fused(gained, None)[1]
        return hidden, gained


def _add_norm(
    norm: LayerNorm | RmsNorm | None, hidden: Tensor, gained: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(hidden + gained, its norm) by a GPU's kernels; the sum itself where there is no norm."""
    if norm is not None:
        return norm.fused(hidden, gained)
    summed = hidden if gained is None else hidden + gained
    return summed, summed


def _as_saved(take: TakeWeight, sizes: DenseConfig) -> TakeWeight:
    """`take`, with what was saved in bf16 left so for a model of fp32 activations: for tables, and for products that are told
    the dtype of their inputs. An fp32 copy on the way is twice the weight."""
    return partial(take, as_saved=True) if sizes.dtype == torch.float32 else take


def _take_norm(take: Take, name: str, sizes: DenseConfig) -> LayerNorm | RmsNorm:
    if sizes.layer_norm:
        return take_norm(take, name, sizes.dim, sizes.eps)
    if sizes.unit_offset:
        # Kept in fp32: 1 + w has more digits than bf16 does.
        return RmsNorm(take(f"{name}.weight", sizes.dim, dtype=torch.float32) + 1.0, sizes.eps)
    return RmsNorm(take(f"{name}.weight", sizes.dim), sizes.eps)


def _take_qkv(
    take: Take, take_weight: TakeWeight, name: str, sizes: DenseConfig, dtype: torch.dtype
) -> PackedLinear:
    """q, k and v as one product, the dimensions of each q and k head in rotary pairs (see `pair_order`)."""
    widths = (sizes.q_dim, sizes.kv_dim, sizes.kv_dim)
    order = _qkv_order(sizes)

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
    weight = together(parts(_as_saved(take_weight, sizes), "weight", sizes.dim))
    ordered = weight[order.to(weight.device)] if isinstance(weight, Tensor) else weight.ordered(order)
    return PackedLinear(ordered, bias, dtype=dtype)


def _qkv_order(sizes: DenseConfig) -> Tensor:
    """Which row of q, k and v (all stacked) stands where: those of each q and k head in pairs, v's as they are."""
    pairs = pair_order(sizes.head_dim, sizes.rotary_dim)
    heads = torch.arange(sizes.num_heads + sizes.num_kv_heads).unsqueeze(1) * sizes.head_dim
    rotated = (heads + pairs).flatten()
    return torch.cat([rotated, torch.arange(len(rotated), len(rotated) + sizes.kv_dim)])


def _take_gate_up(
    take: Take, take_weight: TakeWeight, name: str, sizes: DenseConfig, dtype: torch.dtype
) -> PackedLinear:
    def stacked(take: TakeWeight, kind: str, *inputs: int) -> Tensor | Quantised:
        if sizes.fused_projections:
            return take(f"{name}.gate_up_proj.{kind}", 2 * sizes.ff_dim, *inputs)
        return together(
            [take(f"{name}.{part}_proj.{kind}", sizes.ff_dim, *inputs) for part in ("gate", "up")]
        )

    bias = stacked(take, "bias") if sizes.mlp_bias else None
    assert bias is None or isinstance(bias, Tensor)
    weight = stacked(_as_saved(take_weight, sizes), "weight", sizes.dim)
    return PackedLinear(weight, bias, gated=not sizes.gelu, dtype=dtype)


def _take_scaled(
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
    weight = _as_saved(take_weight, sizes)(f"{name}.weight", outputs, inputs)
    if sizes.residual_scale != 1.0:
        bias = None if bias is None else scaled(bias)
        weight = scaled(weight) if isinstance(weight, Tensor) else weight.scaled(sizes.residual_scale)
    return PackedLinear(weight, bias, dtype=dtype)


def load_dense(
    source: Source,
    sizes: DenseConfig,
    card: ModelCard,
    device: torch.device,
    dtype: torch.dtype,
    report: ProgressReport,
    *,
    rename: Rename = Target,
    build: Callable[..., Dense] | None = None,
) -> Dense:
    """Build the model. Raises CheckpointError unless exactly this model is there.

    `rename` gives stored tensors the names that this decoder has for them; `build` makes a model of it that has more parts,
    from the arguments of `Dense`.
    """

    def canonical(stored: str) -> Target | None:
        renamed = rename(stored)
        return renamed and _canonical_name(renamed.name, sizes.tied)

    checkpoint = source.open(report, canonical)
    if sizes.tied is None:
        sizes = replace(sizes, tied="lm_head.weight" not in checkpoint)
    sizes = replace(sizes, dtype=dtype)
    taker = Taker(checkpoint, device, dtype)
    model = (build or Dense)(sizes, card, taker.take, device, taker.take_weight)
    checkpoint.finish()
    model.weight_bytes, model.num_weights = taker.weight_bytes, taker.num_weights
    return model


def _canonical_name(stored: str, tied: bool | None) -> Target | None:
    """A tensor's name; None for tensors that are computed here, and for the copy of tied embeddings in some checkpoints."""
    if _COMPUTED.search(stored) or (tied and stored == "lm_head.weight"):
        return None
    return Target(f"model.{stored}" if _BARE.match(stored) else stored)
