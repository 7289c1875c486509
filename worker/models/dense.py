"""Owns the blocks of dense decoders: grouped-head attention and a gated MLP a layer, by a family's settings. Decode thread.

A decode step of a small model on a CPU costs as much in operator calls as in arithmetic, so weights are arranged at load
for few calls: q, k and v are one product, as are gate and up; a rotary pair is one complex number; products add the
residual, and factors of sums are multiplied into weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.protocol import ModelCard
from worker.formats.source import ProgressReport, Rename, Source, Target
from worker.forward import StateShape
from worker.models.attention import AttentionPlan
from worker.models.conv_block import ConvBlock
from worker.models.decoder import Block, Decoder
from worker.models.dense_config import DenseConfig
from worker.models.dense_weights import (
    as_saved,
    take_block_norm,
    take_gated_mlp,
    take_qkv,
    take_scaled,
    take_words,
)
from worker.models.head import Head
from worker.models.layers import GatedMlp, LayerNorm, RmsNorm
from worker.models.linear import Take, TakeWeight
from worker.models.mixture import Mixture, take_mixture
from worker.models.qk_norm import head_weights, product_norm
from worker.models.rope import rotation_table
from worker.models.taking import Taker
from worker.models.words import TiedWords
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
        weight = as_saved(take_weight, sizes)(embedding if sizes.tied else "lm_head.weight", *table)
        own = weight if sizes.tied and isinstance(weight, Tensor) else None
        dtype = sizes.dtype
        is_copy = dtype is not None  # as all that comes from a checkpoint
        if dtype is None:
            own = take_words(take, sizes, embedding) if own is None else own
            dtype = own.dtype
        head = Head(weight, scale=sizes.logit_scale, cap=sizes.logit_cap, dtype=dtype, consumes=is_copy)
        tied = head.words() if sizes.tied and is_copy else None
        if own is None and (tied is None or device.type == "meta"):
            own = take_words(take, sizes, embedding)
        if tied is not None and device.type == "meta":
            tied = TiedWords(tied.packed, own)
        words = tied or own
        assert words is not None
        del weight, own  # packed: what was read goes before more is
        layers = range(sizes.num_layers)
        blocks = [_block(take, take_weight, f"model.layers.{i}", sizes, i, dtype) for i in layers]
        norm = take_block_norm(take, "model.norm", sizes)
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
            convolving=frozenset() if sizes.conv is None else sizes.conv.layers,
            dtype=dtype,
        )
        if sizes.conv is not None:
            self.states = StateShape(len(sizes.conv.layers), sizes.conv.num_taps - 1, sizes.dim)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step of one row reads: of experts those of the chosen."""
        idle = [
            block.mlp.idle_bytes
            for block in self._blocks
            if isinstance(block, _Block) and isinstance(block.mlp, Mixture)
        ]
        return super().step_bytes - sum(idle)


def _block(
    take: Take, take_weight: TakeWeight, name: str, sizes: DenseConfig, index: int, dtype: torch.dtype
) -> Block:
    if sizes.conv is not None and index in sizes.conv.layers:
        return ConvBlock(take, take_weight, name, sizes, dtype)
    return _Block(take, take_weight, name, sizes, index, dtype)


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
            return None if part is None else take_block_norm(take, f"{name}.{part}", sizes)

        self._before_attention, self._after_attention = (
            norm(names.before_attention),
            norm(names.after_attention),
        )
        self._before_mlp, self._after_mlp = norm(names.before_mlp), norm(names.after_mlp)
        self._qkv = take_qkv(take, take_weight, attention, sizes, dtype)
        self._qk_weight = head_weights(take, attention, sizes)
        self._head_norm = RmsNorm(torch.ones(sizes.head_dim, device=self._qkv.device), sizes.eps)
        self._product_norm = product_norm(take, attention, sizes)
        self._out = take_scaled(
            take, take_weight, sizes, dtype, f"{attention}.o_proj", sizes.dim, sizes.q_dim, sizes.out_bias
        )
        self.mlp: GatedMlp | Mixture
        if sizes.experts is not None and index in sizes.experts.layers:
            self.mlp = take_mixture(take, take_weight, f"{name}.mlp", sizes.experts, sizes.dim, dtype)
        else:
            self.mlp = take_gated_mlp(take, take_weight, f"{name}.mlp", sizes, dtype)

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
            return self.mlp.add(normed, hidden)
        return hidden + self._after_mlp(self.mlp(normed))

    def _product(self, normed: Tensor, *, fused: bool = False) -> Tensor:
        qkv = self._qkv.fused(normed) if fused else self._qkv(normed)
        return qkv if self._product_norm is None else self._product_norm(qkv)

    def native_layer(self) -> GatedLayer | None:
        """See `decoder.Block`: two RMS norms before, none after, the first rotation, a SiLU gate."""
        if isinstance(self.mlp, Mixture):
            return None
        first, second = self._before_attention, self._before_mlp
        qkv, out, gate_up, down = (x.native for x in (self._qkv, self._out, self.mlp.gate_up, self.mlp.down))
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        if (
            not isinstance(first, RmsNorm)
            or not isinstance(second, RmsNorm)
            or first.weight.dtype != self._qkv.dtype
        ):
            return None
        plain = self._after_attention is None and self._after_mlp is None and self._product_norm is None
        if not plain or self._kind.rotation or not self.mlp.gate_up.gates_native:
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
            return hidden, self.mlp.fused(normed, gained)
        hidden, normed = _add_norm(self._before_mlp, hidden, gained)
        gained = self.mlp.fused(normed)
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
