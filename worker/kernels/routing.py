"""Owns choosing each token's experts by its router's logits. Decode thread."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import next_power_of_two
from worker.kernels.dependent import await_inputs, launch_options


@triton.jit
def _choose(
    logits_ptr,
    ids_ptr,
    shares_ptr,
    logits_stride,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row. The choices of a row differ whatever its logits are: those of a faulty row are NaN, and the product gathers each
    row once an expert."""
    await_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    places = tl.arange(0, BLOCK_CHOSEN)
    logits = tl.load(logits_ptr + row * logits_stride + lanes, mask=lanes < EXPERTS, other=float("-inf"))
    left = tl.where(logits == logits, logits, float("-inf"))
    free = lanes < EXPERTS
    best = tl.max(left, 0)
    parts = tl.zeros([BLOCK_CHOSEN], tl.float32)
    chosen = tl.zeros([BLOCK_CHOSEN], tl.int32)
    for place in range(CHOSEN):
        now = tl.max(tl.where(free, left, float("-inf")), 0)
        at = tl.min(tl.where(free & (left == now), lanes, BLOCK), 0)
        free = free & (lanes != at)
        chosen = tl.where(places == place, at, chosen)
        parts = tl.where(places == place, tl.exp(now - best), parts)
    if OVER_CHOSEN:
        total = tl.sum(tl.where(places < CHOSEN, parts, 0.0), 0)
    else:
        total = tl.sum(tl.where(lanes < EXPERTS, tl.exp(logits - best), 0.0), 0)
    # A NaN among the logits is left out of the choice, but not out of the row's result.
    spoilt = tl.max((logits != logits).to(tl.int32), 0)
    total = tl.where(spoilt > 0, float("nan"), total)
    inside = places < CHOSEN
    tl.store(ids_ptr + row * CHOSEN + places, chosen, mask=inside)
    tl.store(shares_ptr + row * CHOSEN + places, parts / total, mask=inside)


def choose_experts(logits: Tensor, num_chosen: int, *, over_chosen: bool = True) -> tuple[Tensor, Tensor]:
    """(N, E) fp32 logits, rows may be strided → ids (N, K) int32 of the largest, largest first, and their weights (N, K) fp32.
    The reference is `worker.models.experts.choose`; of equal logits the lower id comes first."""
    rows, experts = logits.shape
    assert logits.stride(1) == 1 and num_chosen <= experts and logits.dtype == torch.float32
    ids = torch.empty((rows, num_chosen), dtype=torch.int32, device=logits.device)
    shares = torch.empty((rows, num_chosen), dtype=torch.float32, device=logits.device)
    _choose[(rows,)](
        logits,
        ids,
        shares,
        logits.stride(0),
        EXPERTS=experts,
        CHOSEN=num_chosen,
        OVER_CHOSEN=over_chosen,
        BLOCK=next_power_of_two(experts),
        BLOCK_CHOSEN=next_power_of_two(num_chosen),
        num_warps=1,
        **launch_options(logits.device),
    )
    return ids, shares
