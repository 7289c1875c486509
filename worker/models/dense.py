"""Owns the dense decoder that Llama and Qwen3 share: grouped-head attention and a gated MLP a layer. Decode thread.

At a few million parameters a decode step on a CPU is as much operator calls as it is arithmetic, so weights are
arranged at load for few of them: q, k and v are one product, as are gate and up; a rotary pair is one complex
number; residual sums ride in the products.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.protocol import ModelCard
from worker.formats.source import ProgressReport, Source, Target
from worker.forward import ImageCrops, KVCache, StepTokens
from worker.models.attention import AttentionPlan, GatherSpace, fastest_kv_dtype, fuses
from worker.models.dense_config import DenseConfig
from worker.models.layers import GatedMlp, PackedLinear, RmsNorm, Take
from worker.models.rope import pair_order, rotation_table
from worker.native.operations import operations
from worker.native.stack import GatedLayer, layer_stack

if TYPE_CHECKING:
    from worker.kernels.fused import FusedPlan

_COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


class Dense:
    """A loaded dense decoder; implements `contract.Model`. It reads text only.

    `kv_dtype` is the dtype its cache runs fastest in, see `fastest_kv_dtype`. Any float dtype works.
    """

    prefix_tokens = 0
    encoder = None

    def __init__(self, sizes: DenseConfig, card: ModelCard, take: Take, device: torch.device) -> None:
        self.card = card
        self.sizes = sizes
        self.device = device
        self.num_layers = sizes.num_layers
        self.num_kv_heads = sizes.num_kv_heads
        self.head_dim = sizes.head_dim
        self.weight_bytes = 0
        self._words = take("model.embed_tokens.weight", sizes.vocab_size, sizes.dim)
        self.dtype = self._words.dtype
        self._native = operations(device)
        self.kv_dtype = fastest_kv_dtype(device, self.dtype, self._native)
        self._blocks = [_Block(take, f"model.layers.{index}", sizes) for index in range(sizes.num_layers)]
        self._norm = RmsNorm(take("model.norm.weight", sizes.dim), sizes.eps)
        # Tied weights: on a GPU one tensor serves both; a CPU multiplies by a repacked copy.
        head = self._words if sizes.tied else take("lm_head.weight", sizes.vocab_size, sizes.dim)
        self._lm_head = PackedLinear(head)
        layers = [block.native_layer() for block in self._blocks]
        self._stack = layer_stack(
            layers, device, self.dtype, num_heads=sizes.num_heads, eps=sizes.eps, qk_eps=sizes.eps
        )
        self._space = GatherSpace()
        self.fuses = fuses(device, sizes.head_dim)
        self._rotations = rotation_table(sizes.rope, sizes.head_dim, sizes.context_tokens, device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """(N,) int64 ids → (N, D) input embeddings."""
        return F.embedding(token_ids, self._words)

    def embed_next(self, token_ids: Tensor, values: Tensor, spatial: Tensor) -> Tensor:
        """(B,) freshly sampled ids → (B, D). A text model has no coordinates: the rest is ignored."""
        return F.embedding(token_ids, self._words)

    def encode_images(self, images: list[ImageCrops]) -> list[Tensor]:
        """Refused: intake lets no picture through to a model whose card has no `image`."""
        if images:
            raise RuntimeError(f"{self.card.model_id} reads text only; it cannot encode a picture")
        return []

    def forward(self, hidden: Tensor, tokens: StepTokens, cache: KVCache) -> Tensor:
        """(N, D) embeddings → (N, D) hidden states before the final norm; writes K and V of all N tokens."""
        rotation = self._rotations.index_select(0, tokens.positions)
        if self.fuses:
            return self._forward_fused(hidden, rotation, tokens, cache)
        if self._stack is not None:
            done = self._stack.run(hidden, tokens, cache, rotation)
            if done is not None:
                return done
        plan = AttentionPlan(tokens, cache, self._space, self._native, rotation, hidden.dtype)
        for layer, block in enumerate(self._blocks):
            hidden = block(hidden, plan, layer)
        return hidden

    def _forward_fused(self, hidden: Tensor, rotation: Tensor, tokens: StepTokens, cache: KVCache) -> Tensor:
        from worker.kernels.fused import FusedPlan  # here, so that no CPU worker imports Triton

        plan = FusedPlan(tokens, cache, rotation)
        gained: Tensor | None = None
        for layer, block in enumerate(self._blocks):
            hidden, gained = block.fused(hidden, gained, plan, layer)
        return hidden if gained is None else hidden + gained

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states of the sampling positions → (R, V) fp32 logits."""
        return self._lm_head(self._norm(hidden)).float()

    def decode_values(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Refused: intake lets no spatial task through to a model without one among its capabilities."""
        raise RuntimeError(f"{self.card.model_id} reads text only; its tokens stand for no coordinates")


class _Block:
    """One layer: attention, then the MLP, each behind its norm and added to the residual stream."""

    def __init__(self, take: Take, name: str, sizes: DenseConfig) -> None:
        dim = sizes.dim
        self._head_dim = sizes.head_dim
        self._num_heads = sizes.num_heads
        self._num_rotated = sizes.num_heads + sizes.num_kv_heads
        self._attention_norm = RmsNorm(take(f"{name}.input_layernorm.weight", dim), sizes.eps)
        self._qkv = _take_qkv(take, f"{name}.self_attn", sizes)
        self._qk_norm = _QkNorm(take, f"{name}.self_attn", sizes) if sizes.qk_norm else None
        bias = take(f"{name}.self_attn.o_proj.bias", dim) if sizes.attention_bias else None
        self._out = PackedLinear(take(f"{name}.self_attn.o_proj.weight", dim, sizes.q_dim), bias)
        self._mlp_norm = RmsNorm(take(f"{name}.post_attention_layernorm.weight", dim), sizes.eps)
        self._mlp = _take_mlp(take, f"{name}.mlp", sizes)

    def __call__(self, hidden: Tensor, plan: AttentionPlan, layer: int) -> Tensor:
        qkv, norm = self._qkv(self._attention_norm(hidden)), self._qk_norm
        if norm is None:
            mixed = plan.attend_product(layer, qkv, self._num_heads, self._split)
        else:
            mixed = plan.attend_product(
                layer, qkv, self._num_heads, self._split, qk_weight=norm.weight, eps=norm.eps
            )
        hidden = self._out.add(mixed, hidden)
        return self._mlp.add(self._mlp_norm(hidden), hidden)

    def native_layer(self) -> GatedLayer | None:
        """This layer for a call over all of them; None unless each of its products is compiled."""
        qkv, out, gate_up, down = (
            x.native for x in (self._qkv, self._out, self._mlp.gate_up, self._mlp.down)
        )
        if (
            qkv is None
            or out is None
            or gate_up is None
            or down is None
            or not self._mlp.gate_up.gates_native
        ):
            return None
        return GatedLayer(
            attention_norm=self._attention_norm.weight.data_ptr(),
            qkv=qkv,
            qk_weight=None if self._qk_norm is None else self._qk_norm.weight.data_ptr(),
            out=out,
            mlp_norm=self._mlp_norm.weight.data_ptr(),
            gate_up=gate_up,
            down=down,
        )

    def _split(self, qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `attention.Split`. All in fp32."""
        num_heads, num_rotated, head_dim = self._num_heads, self._num_rotated, self._head_dim
        # Nothing that is not finite reaches the cache: a masked NaN would still spoil the pages' next owner. The
        # faulty row itself is found by its output, which keeps the NaN through the residual stream.
        heads = qkv.float().nan_to_num_(0.0, 0.0, 0.0).view(-1, 2 * num_rotated - num_heads, head_dim)
        rotated, value = heads.split((num_rotated, num_rotated - num_heads), 1)
        if self._qk_norm is not None:
            rotated = self._qk_norm(rotated)
        # Rotary embedding in fp32 and in place: one complex product over the heads of q and k.
        torch.view_as_complex(rotated.view(-1, num_rotated, head_dim // 2, 2)).mul_(rotation)
        query, key = rotated.split((num_heads, num_rotated - num_heads), 1)
        return query, key, value

    def fused(
        self, hidden: Tensor, gained: Tensor | None, plan: FusedPlan, layer: int
    ) -> tuple[Tensor, Tensor]:
        """As `__call__` with a GPU's kernels. `gained` is what the block before adds to the residual stream: each
        sum is taken with the norm behind it. Returns the stream, and what this block's MLP adds to it."""
        hidden, normed = self._attention_norm.fused(hidden, gained)
        qkv, norm = self._qkv(normed), self._qk_norm
        if norm is None:
            mixed = plan.attend(layer, qkv, self._num_heads)
        else:
            mixed = plan.attend(layer, qkv, self._num_heads, qk_weight=norm.weight, eps=norm.eps)
        hidden, normed = self._mlp_norm.fused(self._out(mixed), hidden)
        return hidden, self._mlp.fused(normed)


class _QkNorm:
    """Qwen3's RMS norm of each query and key head, with one weight (head_dim,) for all queries, one for all keys."""

    def __init__(self, take: Take, name: str, sizes: DenseConfig) -> None:
        order = pair_order(sizes.head_dim)
        query = take(f"{name}.q_norm.weight", sizes.head_dim, dtype=torch.float32)[order]
        key = take(f"{name}.k_norm.weight", sizes.head_dim, dtype=torch.float32)[order]
        self.eps = sizes.eps
        self.weight = torch.cat([query.expand(sizes.num_heads, -1), key.expand(sizes.num_kv_heads, -1)])
        self._norm = RmsNorm(torch.ones_like(query), sizes.eps)

    def __call__(self, rotated: Tensor) -> Tensor:
        """(N, H + KH, D) fp32 → the same, normed, in new memory."""
        return self._norm(rotated) * self.weight


def _take_qkv(take: Take, name: str, sizes: DenseConfig) -> PackedLinear:
    """q, k and v as one product, the dimensions of each q and k head in rotary pairs (see `pair_order`)."""
    order = pair_order(sizes.head_dim)
    parts = [("q_proj", sizes.q_dim), ("k_proj", sizes.kv_dim), ("v_proj", sizes.kv_dim)]

    def fused(kind: str, *inputs: int) -> Tensor:
        tensors = [take(f"{name}.{part}.{kind}", width, *inputs) for part, width in parts]
        for i in (0, 1):
            heads = tensors[i].view(-1, sizes.head_dim, *inputs)
            tensors[i] = heads[:, order.to(heads.device)].reshape(tensors[i].shape)
        return torch.cat(tensors)

    return PackedLinear(fused("weight", sizes.dim), fused("bias") if sizes.attention_bias else None)


def _take_mlp(take: Take, name: str, sizes: DenseConfig) -> GatedMlp:
    dim, ff_dim = sizes.dim, sizes.ff_dim

    def fused(kind: str, *inputs: int) -> Tensor:
        return torch.cat([take(f"{name}.{part}_proj.{kind}", ff_dim, *inputs) for part in ("gate", "up")])

    gate_up = PackedLinear(fused("weight", dim), fused("bias") if sizes.mlp_bias else None, gated=True)
    bias = take(f"{name}.down_proj.bias", dim) if sizes.mlp_bias else None
    return GatedMlp(gate_up, PackedLinear(take(f"{name}.down_proj.weight", dim, ff_dim), bias))


def load_dense(
    source: Source,
    sizes: DenseConfig,
    card: ModelCard,
    device: torch.device,
    dtype: torch.dtype,
    report: ProgressReport,
) -> Dense:
    """Build the model. Raises CheckpointError unless exactly this model is there."""
    checkpoint = source.open(report, lambda stored: _canonical_name(stored, sizes.tied))
    if sizes.tied is None:
        sizes = replace(sizes, tied="lm_head.weight" not in checkpoint)
    weight_bytes = 0

    def take(name: str, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        nonlocal weight_bytes
        tensor = checkpoint.take(name, *shape, device=device, dtype=dtype)
        weight_bytes += tensor.nbytes
        return tensor

    model = Dense(sizes, card, take, device)
    checkpoint.finish()
    model.weight_bytes = weight_bytes
    return model


def _canonical_name(stored: str, tied: bool | None) -> Target | None:
    """None for what is computed here, and for the copy of tied embeddings that some checkpoints carry."""
    if _COMPUTED.search(stored) or (tied and stored == "lm_head.weight"):
        return None
    return Target(stored)
