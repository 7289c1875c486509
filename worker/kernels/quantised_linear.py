"""Owns weight-only quantised products for small batches: int8 and int4 weights, one scale a group. Decode thread.

At a handful of rows a product is as quick as its weights can be read, so halving or quartering their bytes is
the whole gain; they are widened in registers (as in LLM.int8, Dettmers et al. 2022, and AWQ, Lin et al. 2023,
without their calibration). Symmetric round-to-nearest; a group runs along the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import is_interpreted

MAX_ROWS = 16
BLOCK_OUT = 32
BLOCK_IN = 128


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A weight (out, in) as integers: int8 (out, in), or int4 packed (out, in / 2), even inputs in the low nibble."""

    packed: Tensor  # int8; for 4 bits uint8
    scales: Tensor  # (out, in / group) fp32
    bits: int
    group: int


def quantise(weight: Tensor, bits: int = 8, group: int | None = None) -> IntegerWeight:
    """Round a (out, in) weight to `bits` (8 or 4). `group` None: one scale a row; else a multiple of 128 (or in)."""
    outputs, inputs = weight.shape
    group = group or inputs
    assert bits in (4, 8) and inputs % group == 0 and inputs % 2 == 0
    most = 2 ** (bits - 1) - 1
    grouped = weight.float().view(outputs, inputs // group, group)
    scales = grouped.abs().amax(dim=2).clamp_min(1e-12) / most
    rounded = (grouped / scales.unsqueeze(2)).round().clamp(-most, most).to(torch.int8).view(outputs, inputs)
    if bits == 4:
        nibbles = (rounded + 8).to(torch.uint8)
        rounded = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return IntegerWeight(rounded.contiguous(), scales.contiguous(), bits, group)


def dequantise(weight: IntegerWeight) -> Tensor:
    """The (out, in) fp32 weight that the integers stand for: the reference's."""
    packed = weight.packed
    if weight.bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1).to(torch.int8) - 8
    outputs = packed.shape[0]
    grouped = packed.float().view(outputs, -1, weight.group) * weight.scales.unsqueeze(2)
    return grouped.view(outputs, -1)


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    num_rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.arange(0, ROWS)
    inside = outs < OUTPUTS
    exists = (rows < num_rows)[:, None]
    total = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    for start in range(0, INPUTS, BLOCK_IN):
        if BITS == 8:
            ins = start + tl.arange(0, BLOCK_IN)
            valid = ins < INPUTS
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + ins[None, :], mask=exists & valid[None, :], other=0.0
            )
            at = outs[:, None].to(tl.int64) * INPUTS + ins[None, :]
            w = tl.load(weight_ptr + at, mask=inside[:, None] & valid[None, :], other=0)
            if WIDEN:
                part = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), input_precision="ieee")
            else:
                part = tl.dot(x, tl.trans(w.to(x.dtype)))
        else:
            pairs = start // 2 + tl.arange(0, BLOCK_IN // 2)
            valid = pairs < INPUTS // 2
            from_x = x_ptr + rows[:, None] * x_stride + 2 * pairs[None, :]
            even = tl.load(from_x, mask=exists & valid[None, :], other=0.0)
            odd = tl.load(from_x + 1, mask=exists & valid[None, :], other=0.0)
            at = outs[:, None].to(tl.int64) * (INPUTS // 2) + pairs[None, :]
            both = tl.load(weight_ptr + at, mask=inside[:, None] & valid[None, :], other=0).to(tl.int32)
            low = ((both & 15) - 8).to(tl.float32)
            high = ((both >> 4) - 8).to(tl.float32)
            if WIDEN:
                part = tl.dot(even.to(tl.float32), tl.trans(low), input_precision="ieee")
                part += tl.dot(odd.to(tl.float32), tl.trans(high), input_precision="ieee")
            else:
                part = tl.dot(even, tl.trans(low.to(even.dtype)))
                part += tl.dot(odd, tl.trans(high.to(even.dtype)))
        scale = tl.load(scales_ptr + outs * (INPUTS // GROUP) + start // GROUP, mask=inside, other=0.0)
        total += part * scale[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + outs, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_at = rows[:, None] * OUTPUTS + outs[None, :]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=exists & inside[None, :])


def quantised_linear(x: Tensor, weight: IntegerWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. x (N, in), N ≤ 16, fp32, bf16 or fp16, rows may be strided; returns (N, out) in x's dtype.

    The reference is `x @ dequantise(weight).T + bias`.
    """
    num_rows, inputs = x.shape
    outputs = weight.packed.shape[0]
    assert num_rows <= MAX_ROWS and x.stride(1) == 1
    assert weight.group == inputs or weight.group % BLOCK_IN == 0
    out = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device)
    _product[(triton.cdiv(outputs, BLOCK_OUT),)](
        x,
        weight.packed,
        weight.scales,
        weight.scales if bias is None else bias,
        out,
        x.stride(0),
        num_rows,
        INPUTS=inputs,
        OUTPUTS=outputs,
        GROUP=weight.group,
        BITS=weight.bits,
        HAS_BIAS=bias is not None,
        ROWS=MAX_ROWS,
        BLOCK_OUT=BLOCK_OUT,
        BLOCK_IN=BLOCK_IN,
        WIDEN=is_interpreted() or x.dtype == torch.float32,
        num_warps=4,
        num_stages=4,
    )
    return out
