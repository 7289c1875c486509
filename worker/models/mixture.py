"""Owns the mixture of experts that stands in the place of a layer's one MLP: a router in front of `Experts`. Decode thread.

Each token goes through the few experts that the router gives the largest probabilities, as in Switch Transformers (Fedus et
al. 2021) and what followed them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from worker.models.dense_config import MixtureConfig
from worker.models.experts import Experts, choose
from worker.models.held import held_bytes
from worker.models.linear import PackedLinear, Take, TakeWeight, together
from worker.native.quantised import Quantised


class Mixture:
    """The sum of the chosen experts' outputs, each times its weight; callable as `layers.GatedMlp` is."""

    __slots__ = ("_experts", "_num_chosen", "_router", "_sums_to_one")

    def __init__(self, router: PackedLinear, experts: Experts, num_chosen: int, *, sums_to_one: bool) -> None:
        """`router` (experts, D). `sums_to_one`: the weights of the chosen are made to add up to 1."""
        self._router, self._experts = router, experts
        self._num_chosen, self._sums_to_one = num_chosen, sums_to_one

    @property
    def idle_bytes(self) -> int:
        """Bytes of the experts that one token does not choose."""
        idle = self._experts.num_experts - self._num_chosen
        return held_bytes(self._experts) * idle // self._experts.num_experts

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) → (N, D)."""
        logits = self._router.logits(x)
        return self._experts(x, *choose(logits, self._num_chosen, over_chosen=self._sums_to_one))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + mixture(x)."""
        return self(x).add_(residual)

    def fused(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """mixture(x), plus `residual` if given; nothing that a GPU does for it is waited for."""
        return self(x) if residual is None else self.add(x, residual)


def take_mixture(
    take: Take, take_weight: TakeWeight, name: str, config: MixtureConfig, dim: int, dtype: torch.dtype
) -> Mixture:
    """The router stored as `name.gate`, and the experts as `name.experts`, one by one or all in one tensor."""
    router = PackedLinear(take(f"{name}.gate.weight", config.num_experts, dim))
    firsts, seconds = [], []
    for gate, up, down in (_stacked if config.stacked else _apart)(
        take_weight, f"{name}.experts", config, dim
    ):
        firsts.append(together([gate, up]))
        seconds.append(down)
    experts = Experts(firsts, seconds, "silu", dtype)
    return Mixture(router, experts, config.num_chosen, sums_to_one=config.sums_to_one)


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
