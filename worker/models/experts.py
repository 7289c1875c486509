"""Owns layers of routed experts: choosing a token's experts, and the product over those that were chosen. Decode thread.

Only chosen experts' weights are read. A row's result does not depend on the rows beside it: on a CPU each expert is a packed
product of its own, and a row's sums are added in the order of the experts, whatever else the batch holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from worker.models.linear import PackedLinear
from worker.native.quantised import Quantised

Gate = Literal["silu", "gelu_plus_1"]
"""What stands between an expert's two products, of the halves h, g of the first one's outputs:
silu(h) · g (Shazeer 2020), or gelu(h) · (g + 1) with the exact GELU."""

Weight = Sequence["Tensor | Quantised"] | Tensor
"""The experts' weights (outputs, inputs), one after another, or one tensor (E, outputs, inputs)."""


_ROOT_HALF = 0.5**0.5
_ROWS_AT_ONCE = 512  # of a long chunk, so that what lies between the products stays small


def each_of(weight: Tensor | Quantised, number: int) -> Weight:
    """A matrix of all experts' rows, one expert's after another's, as one weight an expert."""
    if isinstance(weight, Tensor):
        return weight.view(number, -1, weight.shape[-1])
    rows = torch.arange(weight.shape[0], device=weight.device).view(number, -1)
    return [weight.ordered(own) for own in rows]


def choose(logits: Tensor, num_chosen: int, *, over_chosen: bool = True) -> tuple[Tensor, Tensor]:
    """(N, E) fp32 logits of the router → ids (N, K) int64 of the largest, largest first, and their weights (N, K) fp32.

    The weights are a softmax over the chosen logits, which is also that over all, made to add up to 1; or that over all
    experts, as it is, without `over_chosen`.
    """
    best = logits.topk(num_chosen, dim=-1)
    if over_chosen:
        return best.indices, best.values.softmax(-1)
    return best.indices, (best.values - logits.logsumexp(-1, keepdim=True)).exp_()


def gated(both: Tensor) -> Tensor:
    """gelu(h) · (g + 1) of (N, 2F), h before g → (N, F) of the same dtype, computed in fp32."""
    first, second = both.float().chunk(2, dim=-1)
    # By erf, of which torch gives a row the same bits in any batch; its gelu takes other sums for a lone row.
    share = torch.mul(first, _ROOT_HALF).erf_().add_(1.0).mul_(0.5)
    return share.mul_(first).mul_(second + 1.0).to(both.dtype)


class Experts:
    """`W2 gate(W1 x)` of each expert, without biases: W1 (2F, D), its rows h before g, and W2 (D, F).

    Weights in a file's blocks stay so where products of `dtype` read those; on a GPU all are of `dtype`. Raises
    ValueError for weights that do not fit together.
    """

    def __init__(self, first: Weight, second: Weight, gate: Gate, dtype: torch.dtype) -> None:
        self.gate: Gate = gate
        self.num_experts = len(first)
        _check(first, second)
        self.dim, self.inner = second[0].shape
        self._stacked: tuple[Tensor, Tensor] | None = None
        self._firsts: list[PackedLinear] = []
        self._seconds: list[PackedLinear] = []
        if first[0].device.type == "cuda":
            self._stacked = _stack(first, dtype), _stack(second, dtype)
            return
        # One after another, so that at most one expert's weights are there twice.
        self._firsts = [PackedLinear(weight, gated=gate == "silu", dtype=dtype) for weight in first]
        self._seconds = [PackedLinear(weight, dtype=dtype) for weight in second]

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, D), ids (N, K) int, the K of a row all different, weights (N, K) fp32 → (N, D) in x's dtype: the sum
        over a row's experts, each times its weight, taken in fp32."""
        if self._stacked is not None:
            from worker.kernels.experts import experts_product  # here, so that no CPU worker imports Triton

            return experts_product(x, ids, weights, *self._stacked, self.gate)
        if x.shape[0] > _ROWS_AT_ONCE:
            pieces = zip(*(one.split(_ROWS_AT_ONCE) for one in (x, ids, weights)), strict=True)
            return torch.cat([self(*piece) for piece in pieces])
        # A row's experts from the lowest to the highest, in any batch: the same sums, to the last bit. What stands between the
        # products is done for all of them at once: behind megabytes of weights each operation begins with cold caches.
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        rows = order // ids.shape[1]
        counts = flat.bincount(minlength=self.num_experts).tolist()
        chosen = [(expert, count) for expert, count in enumerate(counts) if count]
        between = self._inner(chosen, x.index_select(0, rows))
        products = zip(chosen, between.split([count for _, count in chosen]), strict=True)
        parts = torch.cat([self._seconds[expert](own) for (expert, _), own in products])
        shares = weights.flatten()[order].unsqueeze(1)
        total = torch.zeros(x.shape, dtype=torch.float32)
        return total.index_add_(0, rows, parts.float().mul_(shares)).to(x.dtype)

    def _inner(self, chosen: Sequence[tuple[int, int]], x: Tensor) -> Tensor:
        """x (pairs, D) by expert, so many rows of each → (pairs, F)."""
        products = zip(chosen, x.split([count for _, count in chosen]), strict=True)
        if self.gate == "silu":
            return torch.cat([self._firsts[expert].silu_gate(own) for (expert, _), own in products])
        return gated(torch.cat([self._firsts[expert](own) for (expert, _), own in products]))


def _check(first: Weight, second: Weight) -> None:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} experts' first products, {len(second)} second ones")
    for one, two in zip(first, second, strict=True):
        if tuple(one.shape) != (2 * two.shape[1], two.shape[0]):
            raise ValueError(f"an expert's products are {tuple(one.shape)} and {tuple(two.shape)}")


def _stack(weights: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weights, Tensor):
        return weights.to(dtype).contiguous()
    plain = [one if isinstance(one, Tensor) else one.dequantised() for one in weights]
    return torch.stack([one.to(dtype) for one in plain])
