"""Owns Moondream 3 and 3.1: the second generation's vision and prompts in front of a decoder with routed experts and attention
that is scaled by content and position. Decode thread.

A layer: `x + attn(ln(x)) + mlp(ln(x))`, as in Moondream 2. From the fifth layer on the MLP is eight of 64 experts
(`worker.models.experts`), chosen by a router with a bias. Facts: `moondream/torch` of vikhyat/moondream and `models/moondream` of
m87-labs/kestrel, the makers' engine. Where these two differ the engine is followed: the GELU of `Tau` is the tanh approximation,
which its release 0.6.0 corrected it to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.attention import AttentionPlan
from worker.models.decoder import Block
from worker.models.experts import Experts, choose, each_of
from worker.models.held import held_bytes
from worker.models.layers import Mlp, take_linear, take_mlp, take_norm
from worker.models.linear import PackedLinear, Take, TakeWeight
from worker.models.moondream import Moondream, qkv_order, split_heads
from worker.models.moondream_config import ExpertsConfig, MoondreamConfig, TextConfig

if TYPE_CHECKING:
    from worker.kernels.fused import FusedPlan
    from worker.native.stack import Layer


class Moondream3(Moondream):
    """A loaded Moondream 3 or 3.1; implements `contract.Model`."""

    def _block(self, config: MoondreamConfig, take: Take, take_weight: TakeWeight, index: int) -> Block:
        return _Block(take, take_weight, f"text.blocks.{index}", config.text, index)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step of one row reads: of the experts, those that a token chooses."""
        read: float = super().step_bytes
        for block in self._blocks:
            assert isinstance(block, _Block)
            if isinstance(block.mlp, _Routed):
                read -= held_bytes(block.mlp.experts) * (1 - block.mlp.share)
        return int(read)


class _Block:
    """One layer: a single norm feeds attention and MLP, both added to the residual stream."""

    def __init__(
        self, take: Take, take_weight: TakeWeight, name: str, config: TextConfig, index: int
    ) -> None:
        dim, experts = config.dim, config.moe
        self._head_dim = config.head_dim
        self._num_heads = config.n_heads
        self._num_rotated = config.n_heads + config.n_kv_heads
        self._ln = take_norm(take, f"{name}.ln", dim)
        weight = take_weight(f"{name}.attn.qkv.weight", config.qkv_dim, dim)
        order = qkv_order(config).to(weight.device)
        weight = weight[order] if isinstance(weight, Tensor) else weight.ordered(order)
        self._qkv = PackedLinear(weight, take(f"{name}.attn.qkv.bias", config.qkv_dim)[order])
        self._tau = Tau(take, f"{name}.attn.tau", config, order)
        self._proj = take_linear(take, f"{name}.attn.proj", dim, dim, take_weight)
        self.mlp: _Routed | _Dense
        if experts is not None and index >= experts.start_layer:
            self.mlp = _Routed(take, take_weight, f"{name}.mlp", dim, experts)
        else:
            self.mlp = _Dense(take_mlp(take, f"{name}.mlp", dim, config.ff_dim, dim, take_weight))

    def __call__(self, hidden: Tensor, plan: AttentionPlan, layer: int) -> Tensor:
        """See `decoder.Block`."""
        normed = self._ln(hidden)
        qkv = self._tau(self._qkv(normed), plan.log_positions)
        mixed = plan.attend_product(layer, qkv, self._num_heads, self._split)
        return self.mlp.add(normed, self._proj.add(mixed, hidden))

    def native_layer(self) -> Layer | None:
        """None: all layers in one compiled call knows neither experts nor scaled heads."""
        return None

    def _split(self, qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(qkv, rotation, self._num_heads, self._num_rotated, self._head_dim)

    def fused(
        self, hidden: Tensor, gained: Tensor | None, plan: FusedPlan, layer: int
    ) -> tuple[Tensor, Tensor]:
        """See `decoder.Block`."""
        hidden, normed = self._ln.fused(hidden, gained)
        qkv = self._tau.fused(self._qkv.fused(normed), plan.log_positions)
        mixed = plan.attend(layer, qkv, self._num_heads)
        return hidden, self.mlp.fused(normed, self._proj.fused(mixed))


class Tau:
    """q and v of each head times a number of its own, before the rotation; k stays as it is.

    The number is `tanh(gelu(qkv) · w) + 0.5 + sigmoid(α · ln(p + 1))`: of the whole product of q, k and v, and of the position p,
    from 0.
    """

    def __init__(self, take: Take, name: str, config: TextConfig, order: Tensor) -> None:
        """`order`: of the rows of q, k and v in the product, which the columns of w follow."""
        heads = config.n_heads
        self._num_heads, self._head_dim = heads, config.head_dim
        self._content = PackedLinear(take(f"{name}.wqwv", 2 * heads, config.qkv_dim)[:, order])
        self._alpha = take(f"{name}.alpha", heads, dtype=torch.float32)

    def __call__(self, qkv: Tensor, log_positions: Tensor) -> Tensor:
        """qkv (N, 3·H·D), log_positions (N, 1) fp32 → (N, 3·H·D) in qkv's dtype; the scaling is done in fp32. In fp32 it is
        done in place."""
        heads = self._num_heads
        content = self._content(F.gelu(qkv, approximate="tanh")).float().tanh_()
        # sigmoid(z) as (1 + tanh(z / 2)) / 2: torch's tanh gives a row the same bits in any batch, its sigmoid does not.
        position = (log_positions * (0.5 * self._alpha)).tanh_().mul_(0.5).add_(1.0)
        scaled = qkv.float().view(qkv.shape[0], 3, heads, self._head_dim)
        for part, place in ((0, 0), (2, heads)):
            factor = content[:, place : place + heads] + position
            scaled[:, part].mul_(factor.unsqueeze(-1))
        return scaled.view(qkv.shape).to(qkv.dtype)

    def fused(self, qkv: Tensor, log_positions: Tensor) -> Tensor:
        """The same by a GPU's kernels, in place."""
        from worker.kernels.activation import gelu_tanh  # here, so that no CPU worker imports Triton
        from worker.kernels.head_scale import scale_heads

        content = self._content.fused(gelu_tanh(qkv))
        scale_heads(qkv, content, self._alpha, log_positions, self._num_heads)
        return qkv


class _Dense:
    """The MLP of the first layers."""

    def __init__(self, mlp: Mlp) -> None:
        self._mlp = mlp

    def add(self, normed: Tensor, residual: Tensor) -> Tensor:
        """residual + mlp(normed)."""
        return self._mlp.add(normed, residual)

    def fused(self, normed: Tensor, residual: Tensor) -> Tensor:
        """The same by a GPU's kernels."""
        return self._mlp.fc2.fused(self._mlp.fc1.gelu_fused(normed), residual)


class _Routed:
    """The experts that a token's router chooses."""

    def __init__(
        self, take: Take, take_weight: TakeWeight, name: str, dim: int, config: ExpertsConfig
    ) -> None:
        number, inner = config.num_experts, config.expert_inner_dim
        self._num_chosen = config.experts_per_token
        self.share = config.experts_per_token / number
        self._router = take_linear(take, f"{name}.router", dim, number)
        first = each_of(take_weight(f"{name}.fc1.weight", number * 2 * inner, dim), number)
        second = each_of(take_weight(f"{name}.fc2.weight", number * dim, inner), number)
        self.experts = Experts(first, second, "gelu_plus_1", self._router.dtype)

    def add(self, normed: Tensor, residual: Tensor) -> Tensor:
        """residual + mlp(normed)."""
        ids, weights = choose(self._router.logits(normed), self._num_chosen)
        return residual + self.experts(normed, ids, weights)

    def fused(self, normed: Tensor, residual: Tensor) -> Tensor:
        """The same by a GPU's kernels."""
        from worker.kernels.routing import choose_experts

        ids, weights = choose_experts(self._router.logits(normed), self._num_chosen)
        return residual + self.experts(normed, ids, weights)
