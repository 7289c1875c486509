"""Owns the product over each token's chosen experts: rows gathered by expert, two products, the weighted sum. Decode thread.

Four launches, none of which the host waits for, so that a step with them can be captured. Grids have room for any choice of
experts; programs of experts that got no rows, or not as many, end at once and read no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import is_interpreted, next_power_of_two
from worker.kernels.dependent import await_inputs, launch_options

GATES = {"silu": 1, "gelu_plus_1": 2}


@dataclass(frozen=True, slots=True)
class Layout:
    """How the two products are laid out on the device."""

    block_rows: int
    block_out: int
    block_in: int
    num_warps: int
    stages: int


FEW = Layout(block_rows=16, block_out=64, block_in=128, num_warps=4, stages=3)
MANY = Layout(block_rows=64, block_out=64, block_in=64, num_warps=4, stages=3)
FEW_PAIRS_AN_EXPERT = 16
"""Above so many rows an expert, on average, tiles of more rows read each weight less often."""


@triton.jit
def _group(ids_ptr, table_ptr, counts_ptr, num_pairs, capacity, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One program an expert: which (row, choice) pairs chose it, in order."""
    await_inputs(DEPENDENT)
    expert = tl.program_id(0)
    count = 0
    for start in range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        mine = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1).to(tl.int32) == expert
        taken = mine.to(tl.int32)
        places = count + tl.cumsum(taken, 0) - 1
        tl.store(table_ptr + expert * capacity + places, pairs, mask=mine)
        count += tl.sum(taken, 0)
    tl.store(counts_ptr + expert, count)


@triton.jit
def _first_product(
    x_ptr,
    weight_ptr,
    table_ptr,
    counts_ptr,
    out_ptr,
    x_stride,
    capacity,
    CHOSEN: tl.constexpr,
    INPUTS: tl.constexpr,
    INNER: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WIDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A tile of gate(W1 x) of one expert: the products of h and g side by side, one row a (row, choice) pair."""
    await_inputs(DEPENDENT)
    expert = tl.program_id(2)
    count = tl.load(counts_ptr + expert)
    first = tl.program_id(1) * ROWS
    if first >= count:
        return
    places = first + tl.arange(0, ROWS)
    exists = places < count
    pairs = tl.load(table_ptr + expert * capacity + places, mask=exists, other=0)
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = outs < INNER
    lines = weight_ptr + expert.to(tl.int64) * (2 * INNER * INPUTS) + outs[:, None].to(tl.int64) * INPUTS
    x_lines = x_ptr + (pairs // CHOSEN)[None, :].to(tl.int64) * x_stride
    lower = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    upper = lower
    for start in range(0, INPUTS, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        valid = ins < INPUTS
        x = tl.load(x_lines + ins[:, None], mask=valid[:, None] & exists[None, :], other=0.0)
        mine = inside[:, None] & valid[None, :]
        low = tl.load(lines + ins[None, :], mask=mine, other=0.0)
        high = tl.load(lines + (INNER * INPUTS + ins)[None, :], mask=mine, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            low = low.to(tl.float32)
            high = high.to(tl.float32)
        lower = tl.dot(low, x, lower, input_precision="ieee")
        upper = tl.dot(high, x, upper, input_precision="ieee")
    if GATE == 1:
        y = lower / (1.0 + tl.exp(-lower)) * upper
    else:
        y = 0.5 * lower * (1.0 + tl.erf(lower * 0.7071067811865476)) * (upper + 1.0)
    at = pairs[None, :].to(tl.int64) * INNER + outs[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside[:, None] & exists[None, :])


@triton.jit
def _second_product(
    inner_ptr,
    weight_ptr,
    shares_ptr,
    table_ptr,
    counts_ptr,
    part_ptr,
    capacity,
    DIM: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WIDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A tile of W2 y, times the pair's weight: one fp32 row a pair."""
    await_inputs(DEPENDENT)
    expert = tl.program_id(2)
    count = tl.load(counts_ptr + expert)
    first = tl.program_id(1) * ROWS
    if first >= count:
        return
    places = first + tl.arange(0, ROWS)
    exists = places < count
    pairs = tl.load(table_ptr + expert * capacity + places, mask=exists, other=0)
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = outs < DIM
    lines = weight_ptr + expert.to(tl.int64) * (DIM * INNER) + outs[:, None].to(tl.int64) * INNER
    y_lines = inner_ptr + pairs[None, :].to(tl.int64) * INNER
    total = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    for start in range(0, INNER, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        valid = ins < INNER
        y = tl.load(y_lines + ins[:, None], mask=valid[:, None] & exists[None, :], other=0.0)
        weight = tl.load(lines + ins[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
        if WIDEN:
            y = y.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(weight, y, total, input_precision="ieee")
    shares = tl.load(shares_ptr + pairs, mask=exists, other=0.0)
    at = pairs[None, :].to(tl.int64) * DIM + outs[:, None]
    tl.store(part_ptr + at, total * shares[None, :], mask=inside[:, None] & exists[None, :])


@triton.jit
def _sum_choices(
    part_ptr, out_ptr, DIM: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """A row's parts, added in the order of its choices."""
    await_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = dims < DIM
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(CHOSEN):
        total += tl.load(part_ptr + (row * CHOSEN + choice) * DIM + dims, mask=inside, other=0.0)
    tl.store(out_ptr + row * DIM + dims, total.to(out_ptr.dtype.element_ty), mask=inside)


def experts_product(
    x: Tensor, ids: Tensor, weights: Tensor, first: Tensor, second: Tensor, gate: str
) -> Tensor:
    """Σ over a row's experts of its weight times `W2 gate(W1 x)`, in x's dtype; sums in fp32.

    x (N, D), rows may be strided; ids (N, K) int32 or int64, the K of a row all different; weights (N, K) fp32; `first`
    (E, 2F, D), the rows of h before those of g, `second` (E, D, F), both contiguous and of x's dtype; `gate` as
    `worker.models.experts.Gate`. The reference is `worker.models.experts.Experts` on a CPU.
    """
    (num_rows, dim), chosen = x.shape, ids.shape[1]
    experts, inner = first.shape[0], second.shape[2]
    assert first.shape == (experts, 2 * inner, dim) and second.shape == (experts, dim, inner)
    assert x.stride(1) == 1 and first.is_contiguous() and second.is_contiguous()
    ids, weights = ids.contiguous(), weights.contiguous()
    num_pairs = num_rows * chosen
    layout = FEW if num_pairs <= FEW_PAIRS_AN_EXPERT * experts else MANY
    # An expert is chosen once a row at most.
    table = torch.empty((experts, num_rows), dtype=torch.int32, device=x.device)
    counts = torch.empty(experts, dtype=torch.int32, device=x.device)
    between = torch.empty((num_pairs, inner), dtype=x.dtype, device=x.device)
    parts = torch.empty((num_pairs, dim), dtype=torch.float32, device=x.device)
    out = torch.empty((num_rows, dim), dtype=x.dtype, device=x.device)
    options = launch_options(x.device)
    _group[(experts,)](
        ids, table, counts, num_pairs, num_rows,
        BLOCK=min(1024, max(16, next_power_of_two(num_pairs))), num_warps=4, **options,
    )  # fmt: skip
    shape = {
        "INNER": inner,
        "ROWS": layout.block_rows,
        "BLOCK_OUT": layout.block_out,
        "BLOCK_IN": layout.block_in,
        "WIDEN": is_interpreted() or x.dtype == torch.float32,
        "num_warps": layout.num_warps,
        "num_stages": layout.stages,
        **options,
    }
    row_blocks = triton.cdiv(num_rows, layout.block_rows)
    _first_product[(triton.cdiv(inner, layout.block_out), row_blocks, experts)](
        x, first, table, counts, between, x.stride(0), num_rows,
        CHOSEN=chosen, INPUTS=dim, GATE=GATES[gate], **shape,
    )  # fmt: skip
    _second_product[(triton.cdiv(dim, layout.block_out), row_blocks, experts)](
        between, second, weights, table, counts, parts, num_rows, DIM=dim, **shape
    )
    block = min(1024, next_power_of_two(dim))
    _sum_choices[(num_rows, triton.cdiv(dim, block))](
        parts, out, DIM=dim, CHOSEN=chosen, BLOCK=block, num_warps=4, **options
    )
    return out
