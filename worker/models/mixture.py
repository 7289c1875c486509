"""Owns the mixture of experts that stands in a layer's place of one MLP: a router, and gated MLPs for the chosen. Decode thread.

Each token goes through the few experts with the largest logits of the router, as in Switch Transformers (Fedus et al. 2021)
and its followers; only their weights are read. What a token gains is summed in the order of the experts' numbers, so it
does not depend on the tokens beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.models.dense_config import MixtureConfig
from worker.models.layers import GatedMlp, PackedLinear, Take, TakeWeight, together
from worker.native.quantised import Quantised


@dataclass(frozen=True, slots=True)
class Router:
    """Chooses a token's experts: those of the largest probabilities, a softmax over all logits."""

    product: PackedLinear  # (experts, D)
    num_chosen: int
    sums_to_one: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) → weights (N, K) fp32 and experts (N, K) int64."""
        weights, chosen = self.product.logits(x).softmax(-1).topk(self.num_chosen, -1)
        if self.sums_to_one:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen


class Mixture:
    """The sum of the chosen experts' outputs, each times its weight; callable as `layers.GatedMlp` is."""

    __slots__ = ("_experts", "_router")

    def __init__(self, router: Router, experts: Sequence[GatedMlp]) -> None:
        self._router, self._experts = router, experts

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) → (N, D)."""
        return self._summed(x).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + mixture(x)."""
        return self._summed(x).add_(residual).to(x.dtype)

    def fused(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """mixture(x), plus `residual` if given, on a GPU."""
        return self(x) if residual is None else self.add(x, residual)

    def _summed(self, x: Tensor) -> Tensor:
        """(N, D) → (N, D) fp32. The host reads which experts were chosen."""
        weights, chosen = self._router(x)
        experts, order = chosen.flatten().sort(stable=True)
        rows = order // chosen.shape[1]
        weights = weights.flatten()[order].unsqueeze(1)
        x = x[rows]
        total = torch.zeros(len(chosen), x.shape[1], dtype=torch.float32, device=x.device)
        at = 0
        numbers, counts = experts.unique_consecutive(return_counts=True)
        for expert, num in zip(numbers.tolist(), counts.tolist(), strict=True):
            own = slice(at, at + num)
            total.index_add_(0, rows[own], self._experts[expert](x[own]).float().mul_(weights[own]))
            at += num
        return total


def take_mixture(
    take: Take, take_weight: TakeWeight, name: str, config: MixtureConfig, dim: int, dtype: torch.dtype
) -> Mixture:
    """The router stored as `name.gate`, and the experts as `name.experts`, one by one or all in one tensor."""
    router = PackedLinear(take(f"{name}.gate.weight", config.num_experts, dim))
    stored = _stacked if config.stacked else _apart
    experts = [
        GatedMlp(PackedLinear(together([gate, up]), gated=True, dtype=dtype), PackedLinear(down, dtype=dtype))
        for gate, up, down in stored(take_weight, f"{name}.experts", config, dim)
    ]
    return Mixture(Router(router, config.num_chosen, config.sums_to_one), experts)


Weights = tuple[Tensor | Quantised, Tensor | Quantised, Tensor | Quantised]
"""Of one expert: gate (F, D), up (F, D), down (D, F)."""


def _apart(take_weight: TakeWeight, name: str, config: MixtureConfig, dim: int) -> Iterator[Weights]:
    for expert in (f"{name}.{index}" for index in range(config.num_experts)):
        yield (
            take_weight(f"{expert}.gate_proj.weight", config.ff_dim, dim),
            take_weight(f"{expert}.up_proj.weight", config.ff_dim, dim),
            take_weight(f"{expert}.down_proj.weight", dim, config.ff_dim),
        )


def _stacked(take_weight: TakeWeight, name: str, config: MixtureConfig, dim: int) -> Iterator[Weights]:
    """Of tensors whose rows are those of all experts in turn."""
    num, ff = config.num_experts, config.ff_dim
    gate = take_weight(f"{name}.gate_proj.weight", num * ff, dim)
    up = take_weight(f"{name}.up_proj.weight", num * ff, dim)
    down = take_weight(f"{name}.down_proj.weight", num * dim, ff)
    for index in range(num):
        yield _rows(gate, index, ff), _rows(up, index, ff), _rows(down, index, dim)


def _rows(weight: Tensor | Quantised, index: int, rows: int) -> Tensor | Quantised:
    """The rows of one expert."""
    if isinstance(weight, Tensor):
        return weight[index * rows : (index + 1) * rows]
    return weight.ordered(torch.arange(index * rows, (index + 1) * rows))
