"""Owns products of at most 32 rows with what follows them: bias, residual sum, GELU, gate. Decode thread.

At so few rows a product is as quick as its weight is read. Tiles of the weight go through the matrix units as the larger
operand and all rows, padded to 32, as the smaller. Where a weight has too few tiles for the device, several programs share
the inputs of one (split-K), and the last of them to arrive adds their sums in a fixed order. Tiles, splits and padding
depend on the weight alone: a row has the same bits in any batch of up to 32, and from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import is_interpreted, next_power_of_two, num_multiprocessors
from worker.kernels.dependent import await_inputs, launch_options, prefetch

MOST_ROWS = 32
LEAST_TILE = 16
"""Outputs of the smallest tile there may be: a weight of O rows needs at most O / 16 counters."""
GATES = {None: 0, "silu": 1, "gelu": 2}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a product is laid out on the device."""

    block_out: int = (
        64  # outputs of a tile; 64 at least, for Hopper's matrix units take their larger operand so
    )
    block_in: int = 128
    num_warps: int = 4
    stages: int = 4  # of tiles on their way while one is multiplied
    programs: int = 2  # a multiprocessor, wanted: inputs are split until there are so many


SERVED = Layout()
LAYOUTS = {
    "served": SERVED,
    "128 outputs": replace(SERVED, block_out=128, num_warps=8, programs=1),
    "64 inputs": replace(SERVED, block_in=64, stages=6),
    "3 programs": replace(SERVED, stages=3, programs=3),
    "4 programs": replace(SERVED, block_in=64, stages=4, programs=4),
}
"""What `loadtest.gpu.products` measures beside cuBLAS."""


@lru_cache(maxsize=8)
def suits(device: torch.device) -> bool:
    """Whether a multiprocessor has room for the programs that this is laid out for: 228 KB on Hopper, where it was measured.
    Cards with 100 or 164 KB multiply by cuBLAS."""
    properties = torch.cuda.get_device_properties(device)
    room = SERVED.programs * SERVED.stages * SERVED.block_in * (SERVED.block_out + MOST_ROWS) * 2
    return int(properties.shared_memory_per_multiprocessor) >= room


@triton.jit
def _gelu(x):
    """tanh approximation: 0.5·x·(1 + tanh z) is x·sigmoid(2z), which has no overflow to guard against."""
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def add_parts(part_ptr, at, exists, SPLITS: tl.constexpr, PART: tl.constexpr):
    """The sum of a tile's parts, from the first to the last whoever wrote when. Read past the L1, which other
    multiprocessors do not write to."""
    total = tl.load(part_ptr + at, mask=exists, other=0.0, cache_modifier=".cg")
    for split in range(1, SPLITS):
        total += tl.load(part_ptr + at + split * PART, mask=exists, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _few_rows(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    gelu_ptr,
    part_ptr,
    arrivals_ptr,
    x_stride,
    residual_stride,
    out_stride,
    gelu_stride,
    num_rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,
    GATE: tl.constexpr,
    GELU_FROM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    outs = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.arange(0, ROWS)
    inside = outs < OUTPUTS
    exists = rows < num_rows
    first = split * SHARE
    stop = tl.minimum(first + SHARE, INPUTS)
    lines = weight_ptr + outs[:, None].to(tl.int64) * INPUTS
    if DEPENDENT:  # the weights of the first stages, while the kernel before ends: no step writes to them
        ahead = tl.minimum(first + tl.arange(0, AHEAD) * 64, stop - 1)
        known = tl.minimum(outs, OUTPUTS - 1)[:, None].to(tl.int64) * INPUTS
        prefetch(weight_ptr + known + ahead[None, :])
        if GATE > 0:
            prefetch(weight_ptr + (OUTPUTS * INPUTS + known) + ahead[None, :])
    await_inputs(DEPENDENT)

    total = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    upper = total
    for start in tl.range(first, stop, BLOCK_IN, num_stages=STAGES):
        ins = start + tl.arange(0, BLOCK_IN)
        valid = (ins < INPUTS)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + ins[None, :], mask=exists[:, None] & valid, other=0.0)
        weight = tl.load(
            lines + ins[None, :], mask=inside[:, None] & valid, other=0.0, eviction_policy="evict_first"
        )
        if WIDEN:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
        if GATE > 0:
            weight = tl.load(
                lines + (OUTPUTS * INPUTS + ins)[None, :],
                mask=inside[:, None] & valid,
                other=0.0,
                eviction_policy="evict_first",
            )
            if WIDEN:
                weight = weight.to(tl.float32)
            upper = tl.dot(weight, tl.trans(x), upper, input_precision="ieee")

    if SPLITS > 1:
        part: tl.constexpr = ROWS * BLOCK_OUT
        wide: tl.constexpr = part * 2 if GATE > 0 else part
        at = tile * (SPLITS * wide) + rows[None, :] * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
        tl.store(part_ptr + at + split * wide, total, mask=exists[None, :])
        if GATE > 0:
            tl.store(part_ptr + at + split * wide + part, upper, mask=exists[None, :])
        tl.debug_barrier()  # every thread has written before one of them tells that this program has arrived
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived != SPLITS - 1:
            return
        tl.store(arrivals_ptr + tile, 0)  # for the next product by this weight
        total = add_parts(part_ptr, at, exists[None, :], SPLITS, wide)
        if GATE > 0:
            upper = add_parts(part_ptr, at + part, exists[None, :], SPLITS, wide)

    if HAS_BIAS:
        total += tl.load(bias_ptr + outs, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATE > 0:
            upper += tl.load(bias_ptr + OUTPUTS + outs, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATE == 1:
        total = total / (1.0 + tl.exp(-total)) * upper
    if GATE == 2:
        total = _gelu(total) * upper
    mine = inside[:, None] & exists[None, :]
    if HAS_RESIDUAL:
        from_residual = residual_ptr + rows[None, :] * residual_stride + outs[:, None]
        total += tl.load(from_residual, mask=mine, other=0.0).to(tl.float32)
    if GELU_FROM > 0:
        plain = mine & (outs < GELU_FROM)[:, None]
        out_at = rows[None, :] * out_stride + outs[:, None]
        tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=plain)
    if GELU_FROM < OUTPUTS:
        turned = mine & (outs >= GELU_FROM)[:, None]
        gelu_at = rows[None, :] * gelu_stride + (outs - GELU_FROM)[:, None]
        tl.store(gelu_ptr + gelu_at, _gelu(total).to(gelu_ptr.dtype.element_ty), mask=turned)


def choose_share(outputs: int, inputs: int, num_processors: int, layout: Layout = SERVED) -> tuple[int, int]:
    """(programs that share a tile, inputs of each but perhaps the last): from the weight's shape and the device alone."""
    tiles, blocks = triton.cdiv(outputs, layout.block_out), triton.cdiv(inputs, layout.block_in)
    wanted = max(1, layout.programs * num_processors // tiles)
    share = triton.cdiv(blocks, min(wanted, blocks))
    return triton.cdiv(blocks, share), share * layout.block_in


def lines_ahead(layout: Layout, stages: int) -> int:
    """Lines of 128 bytes of each output that are asked for ahead: a power of two, which may reach past the stages."""
    return next_power_of_two(layout.block_in * stages // 64)


def few_rows_product(
    x: Tensor,
    weight: Tensor,
    arrivals: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: str | None = None,
    gelu_out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    layout: Layout = SERVED,
) -> Tensor:
    """x Wᵀ + b and what follows it, for at most 32 rows; sums, bias and all that follows in fp32, rounded once.

    x (N, I), rows may be strided; weight (O, I) contiguous, of x's dtype; bias (O,) of any float dtype. `arrivals`: at least
    O / 16 int32, all 0, which are 0 again afterwards; it belongs to launches that follow each other on one stream. `gate`,
    "silu" or "gelu": act(g) · u of the halves g, u of the outputs, (N, O / 2). `residual` is added to what is returned.
    `gelu_out` (N, F), rows may be strided: becomes the GELU (tanh approximation) of the last F outputs, of which the others
    are returned. Returns `out_dtype`, by default x's. The reference is `F.linear` with the operations named.
    """
    (num_rows, inputs), outputs = x.shape, weight.shape[0]
    assert num_rows <= MOST_ROWS and x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == inputs
    assert arrivals.numel() * LEAST_TILE >= outputs and layout.block_out >= LEAST_TILE
    if gate is not None:
        assert outputs % 2 == 0 and gelu_out is None
        outputs //= 2
    plain = outputs if gelu_out is None else outputs - gelu_out.shape[1]
    out = torch.empty((num_rows, plain), dtype=out_dtype or x.dtype, device=x.device)
    assert gelu_out is None or (
        gelu_out.stride(1) == 1 and gelu_out.shape[0] == num_rows and residual is None
    )
    assert residual is None or (residual.stride(1) == 1 and residual.shape == out.shape)
    splits, share = choose_share(outputs, inputs, num_multiprocessors(x.device), layout)
    tiles = triton.cdiv(outputs, layout.block_out)
    parts = out  # a placeholder: with one program a tile it is neither written nor read
    if splits > 1:
        width = MOST_ROWS * layout.block_out * (1 if gate is None else 2)
        parts = torch.empty((tiles, splits, width), dtype=torch.float32, device=x.device)
    # A gate has two tiles of the weight under way at a time; half as many stages keep two programs a multiprocessor.
    stages = layout.stages if gate is None else max(2, layout.stages // 2)
    turned = out if gelu_out is None else gelu_out
    _few_rows[(tiles, splits)](
        x,
        weight,
        weight if bias is None else bias,
        out if residual is None else residual,
        out,
        turned,
        parts,
        arrivals,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        turned.stride(0),
        num_rows,
        INPUTS=inputs,
        OUTPUTS=outputs,
        SPLITS=splits,
        SHARE=share,
        GATE=GATES[gate],
        GELU_FROM=plain,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=MOST_ROWS,
        BLOCK_OUT=layout.block_out,
        BLOCK_IN=layout.block_in,
        STAGES=stages,
        AHEAD=lines_ahead(layout, stages),
        WIDEN=is_interpreted() or x.dtype == torch.float32,
        num_warps=layout.num_warps,
        num_stages=stages,
        **launch_options(x.device),
    )
    return out
