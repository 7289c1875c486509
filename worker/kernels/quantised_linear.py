"""Owns products with integer weights on a GPU: 8 or 4 bits, a scale (and an offset) for each unit of inputs. Decode thread.

At a handful of rows a product is as quick as its weights can be read, so halving or quartering their bytes is the whole
gain (LLM.int8, Dettmers et al. 2022; AWQ, Lin et al. 2023). Integers of so few bits are exact in bf16: they go through the
matrix units as the larger operand, unscaled, a unit at a time, and its sums are scaled in fp32. Programs share the inputs of
a tile as in `few_rows_product`. Where many rows share a weight, arithmetic bounds the product: it is expanded first, and
multiplied by cuBLAS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import is_interpreted, num_multiprocessors
from worker.kernels.dependent import await_inputs, launch_options
from worker.kernels.few_rows_product import add_parts
from worker.kernels.integer_weight import TILE, IntegerWeight

ROWS = 32
"""Rows of one launch."""
MAX_ROWS = 64
"""Up to so many by launches; more go by an expanded weight."""
PROGRAMS = 4
"""A multiprocessor, wanted: inputs are split until there are so many."""
STAGES = 3


@triton.jit
def _scaled(sums, factors, columns, j: tl.constexpr):
    """Each output's sums by its factor in column `j` of (64, ahead)."""
    return sums * tl.sum(tl.where(columns == j, factors, 0.0), 1)[:, None]


@triton.jit
def _few_integers(
    x_ptr,
    weight_ptr,
    scales_ptr,
    least_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    arrivals_ptr,
    x_stride,
    num_rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,
    BITS: tl.constexpr,
    HAS_LEAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    lanes = tl.arange(0, TILE)
    rows = tl.arange(0, ROWS)
    exists = rows < num_rows
    first = split * SHARE
    stop = tl.minimum(first + SHARE, UNITS)
    width: tl.constexpr = 16 if BITS == 4 else UNIT
    zero: tl.constexpr = 8 if BITS == 4 and not HAS_LEAST else 0
    k = tl.arange(0, width)
    columns = tl.arange(0, AHEAD)[None, :]
    weights = weight_ptr + tile.to(tl.int64) * (UNITS * TILE * width) + lanes[:, None] * width + k[None, :]
    beside = lanes[:, None] * AHEAD + columns
    scales = scales_ptr + tile.to(tl.int64) * (UNITS * TILE) + beside
    leasts = least_ptr + tile.to(tl.int64) * (UNITS * TILE) + beside
    from_x = x_ptr + rows[:, None] * x_stride
    await_inputs(DEPENDENT)

    total = tl.zeros([TILE, ROWS], tl.float32)
    for start in tl.range(first, stop, AHEAD, num_stages=STAGES):
        # These feed no matrix unit, so that the compiler has them wait here; the weights of later rounds are on their way
        # meanwhile. (Carried from round to round instead, they would keep it from asking for any weight ahead.)
        wide_scale = tl.load(scales + start * TILE).to(tl.float32)
        wide_least = wide_scale
        if HAS_LEAST:
            wide_least = tl.load(leasts + start * TILE).to(tl.float32)
        for j in tl.static_range(AHEAD):
            ins = (start + j) * UNIT + k
            q = tl.load(weights + (start + j) * (TILE * width), eviction_policy="evict_first")
            x = tl.load(from_x + ins[None, :], mask=exists[:, None] & (ins < INPUTS)[None, :], other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
            if BITS == 8:
                sums = tl.dot(q.to(x.dtype), tl.trans(x), input_precision="ieee")
                if HAS_LEAST:
                    inputs = tl.sum(x.to(tl.float32), 1)
            else:
                ins += 16
                y = tl.load(from_x + ins[None, :], mask=exists[:, None] & (ins < INPUTS)[None, :], other=0.0)
                if WIDEN:
                    y = y.to(tl.float32)
                low = ((q & 15).to(tl.int8) - zero).to(x.dtype)
                high = ((q >> 4).to(tl.int8) - zero).to(x.dtype)
                sums = tl.dot(low, tl.trans(x), input_precision="ieee")
                sums = tl.dot(high, tl.trans(y), sums, input_precision="ieee")
                if HAS_LEAST:
                    inputs = tl.sum(x.to(tl.float32) + y.to(tl.float32), 1)
            total += _scaled(sums, wide_scale, columns, j)
            if HAS_LEAST:
                total += _scaled(tl.zeros_like(sums) + inputs[None, :], wide_least, columns, j)

    outs = tile * TILE + lanes
    inside = outs < OUTPUTS
    if SPLITS > 1:
        part: tl.constexpr = ROWS * TILE
        at = tile * (SPLITS * part) + rows[None, :] * TILE + lanes[:, None]
        tl.store(part_ptr + at + split * part, total, mask=exists[None, :])
        tl.debug_barrier()  # every thread has written before one of them tells that this program has arrived
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived != SPLITS - 1:
            return
        tl.store(arrivals_ptr + tile, 0)  # for the next product by this weight
        total = add_parts(part_ptr, at, exists[None, :], SPLITS, part)
    if HAS_BIAS:
        total += tl.load(bias_ptr + outs, mask=inside, other=0.0).to(tl.float32)[:, None]
    out_at = rows[None, :] * OUTPUTS + outs[:, None]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & exists[None, :])


@triton.jit
def _expand(
    weight_ptr,
    scales_ptr,
    least_ptr,
    out_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    AHEAD: tl.constexpr,
    BITS: tl.constexpr,
    HAS_LEAST: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    unit = tl.program_id(1)
    lanes = tl.arange(0, TILE)
    width: tl.constexpr = 16 if BITS == 4 else UNIT
    zero: tl.constexpr = 8 if BITS == 4 and not HAS_LEAST else 0
    k = tl.arange(0, width)
    piece = tile.to(tl.int64) * UNITS + unit
    q = tl.load(weight_ptr + piece * (TILE * width) + lanes[:, None] * width + k[None, :])
    beside = tile.to(tl.int64) * (UNITS * TILE) + (unit // AHEAD * TILE + lanes) * AHEAD + unit % AHEAD
    scale = tl.load(scales_ptr + beside).to(tl.float32)[:, None]
    least = tl.zeros_like(scale)
    if HAS_LEAST:
        least = tl.load(least_ptr + beside).to(tl.float32)[:, None]
    outs = tile * TILE + lanes
    ins = unit * UNIT + k
    out_at = out_ptr + outs[:, None].to(tl.int64) * INPUTS + ins[None, :]
    there = (outs < OUTPUTS)[:, None] & (ins < INPUTS)[None, :]
    kept = out_ptr.dtype.element_ty
    if BITS == 8:
        tl.store(out_at, (q.to(tl.float32) * scale + least).to(kept), mask=there)
    else:
        low = ((q & 15).to(tl.int32) - zero).to(tl.float32) * scale + least
        high = ((q >> 4).to(tl.int32) - zero).to(tl.float32) * scale + least
        tl.store(out_at, low.to(kept), mask=there)
        there = (outs < OUTPUTS)[:, None] & (ins + 16 < INPUTS)[None, :]
        tl.store(out_at + 16, high.to(kept), mask=there)


def expand(weight: IntegerWeight, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight in `dtype`, on its device."""
    outputs, inputs = weight.shape
    out = torch.empty((outputs, inputs), dtype=dtype, device=weight.packed.device)
    _expand[(weight.packed.shape[0], weight.units)](
        weight.packed,
        weight.scales,
        weight.scales if weight.least is None else weight.least,
        out,
        INPUTS=inputs,
        OUTPUTS=outputs,
        UNITS=weight.units,
        UNIT=weight.unit,
        AHEAD=weight.ahead,
        BITS=weight.bits,
        HAS_LEAST=weight.least is not None,
        TILE=TILE,
        num_warps=4,
    )
    return out


def choose_share(tiles: int, units: int, ahead: int, num_processors: int) -> tuple[int, int]:
    """(programs that share a tile, units of each but perhaps the last): from the weight's shape and the device alone, so that a
    row has the same bits in any batch of up to 32."""
    rounds = units // ahead
    wanted = max(
        1, min(PROGRAMS * num_processors // tiles, rounds // 4)
    )  # four rounds at least are worth a start
    share = triton.cdiv(rounds, wanted)
    return triton.cdiv(rounds, share), share * ahead


def quantised_linear(
    x: Tensor, weight: IntegerWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x Wᵀ + b. x (N, in) fp32, bf16 or fp16, rows may be strided; returns (N, out) in `out_dtype`, None: x's dtype.

    Sums and scales are fp32; of more than 64 rows, of weights rounded to x's dtype. The weight's `arrivals` belong to launches
    that follow each other on one stream. The reference is `x @ dequantise(weight).T + bias`.
    """
    num_rows, inputs = x.shape
    outputs = weight.shape[0]
    dtype = out_dtype or x.dtype
    if num_rows > MAX_ROWS and dtype == x.dtype:
        return F.linear(x, expand(weight, x.dtype), bias)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((num_rows, outputs), dtype=dtype, device=x.device)
    tiles = weight.packed.shape[0]
    splits, share = choose_share(tiles, weight.units, weight.ahead, num_multiprocessors(x.device))
    parts = out  # a placeholder: with one program a tile it is neither written nor read
    if splits > 1:
        parts = torch.empty((tiles, splits, ROWS * TILE), dtype=torch.float32, device=x.device)
    for at in range(0, num_rows, ROWS):
        some = x[at : at + ROWS]
        _few_integers[(tiles, splits)](
            some,
            weight.packed,
            weight.scales,
            weight.scales if weight.least is None else weight.least,
            weight.scales if bias is None else bias,
            out[at : at + ROWS],
            parts,
            weight.arrivals,
            x.stride(0),
            some.shape[0],
            INPUTS=inputs,
            OUTPUTS=outputs,
            UNITS=weight.units,
            UNIT=weight.unit,
            AHEAD=weight.ahead,
            SPLITS=splits,
            SHARE=share,
            BITS=weight.bits,
            HAS_LEAST=weight.least is not None,
            HAS_BIAS=bias is not None,
            ROWS=ROWS,
            TILE=TILE,
            STAGES=STAGES,
            WIDEN=is_interpreted() or x.dtype == torch.float32,
            num_warps=4,
            num_stages=STAGES,
            **launch_options(x.device),
        )
    return out
