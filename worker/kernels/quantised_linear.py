"""Owns products with integer weights on a GPU: 8 or 4 bits, a scale (and an offset) for each group of inputs. Decode thread.

At a handful of rows a product is as quick as its weights can be read, so halving or quartering their bytes is the whole
gain; they are widened in registers (as in LLM.int8, Dettmers et al. 2022, and AWQ, Lin et al. 2023). Where many rows share
a weight, arithmetic bounds the product: it is expanded first, and multiplied by cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import is_interpreted

MAX_ROWS = 64
"""Rows of one launch; more go by an expanded weight. Not measured: reading narrow weights should gain up to about there."""
BLOCK_IN = 128
_NARROW = 4096  # outputs; up to so many, narrower blocks give more programs


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A weight (out, in) as `(q - zero) · scale + least`, q int8 (out, in), or for 4 bits uint8 (out, in / 2), even inputs in
    the low half; zero is 8 for 4 bits without an offset, else 0."""

    packed: Tensor
    scales: Tensor  # (out, in / group) fp16 or fp32
    least: Tensor | None  # the same; None for 0
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.packed.shape[0], self.packed.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def num_bytes(self) -> int:
        """What a product reads."""
        parts = (self.packed, self.scales, *([] if self.least is None else [self.least]))
        return sum(part.nbytes for part in parts)

    def rows(self, first: int, last: int) -> IntegerWeight:
        """Some of the outputs, in the same memory."""
        least = None if self.least is None else self.least[first:last]
        return IntegerWeight(self.packed[first:last], self.scales[first:last], least, self.bits, self.group)


def repack(q: Tensor, scale: Tensor, least: Tensor | None) -> IntegerWeight:
    """Levels q (out, in) int8 with scales and offsets (out, in / group) fp32 → the weight. It keeps 4 bits where they suffice.

    Scales are kept in fp16 where that changes none by more than its rounding: products round weights to bf16 anyway.
    """
    assert q.shape[1] % scale.shape[1] == 0 and q.shape[1] % 2 == 0
    group = q.shape[1] // scale.shape[1]
    lowest, highest = int(q.min()), int(q.max())
    bits = (
        4
        if (lowest >= 0 if least is not None else lowest >= -8) and highest < (8 if least is None else 16)
        else 8
    )
    if bits == 4:
        u = (q + 8 if least is None else q).to(torch.uint8)
        q = u[:, 0::2] | (u[:, 1::2] << 4)
    shrunk = [part for part in (scale, least) if part is not None]
    if all(map(_fits_half, shrunk)):
        scale, least = scale.half(), None if least is None else least.half()
    return IntegerWeight(
        q.contiguous(), scale.contiguous(), None if least is None else least.contiguous(), bits, group
    )


def _fits_half(part: Tensor) -> bool:
    return bool(((part.half().float() - part).abs() <= part.abs() * 2**-11).all())


def quantise(weight: Tensor, bits: int = 8, group: int | None = None) -> IntegerWeight:
    """Round a (out, in) weight to `bits` (8 or 4), symmetric and to nearest. `group` None: one scale a row."""
    outputs, inputs = weight.shape
    group = group or inputs
    assert bits in (4, 8) and inputs % group == 0 and inputs % 2 == 0
    most = 2 ** (bits - 1) - 1
    grouped = weight.float().view(outputs, inputs // group, group)
    scales = grouped.abs().amax(dim=2).clamp_min(1e-12) / most
    rounded = (grouped / scales.unsqueeze(2)).round().clamp(-most, most).to(torch.int8).view(outputs, inputs)
    return repack(rounded, scales, None)


def dequantise(weight: IntegerWeight) -> Tensor:
    """The (out, in) fp32 weight that the integers stand for: the reference's."""
    packed = weight.packed
    if weight.bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1).to(torch.int8)
        packed = packed - 8 if weight.least is None else packed
    outputs = packed.shape[0]
    grouped = packed.float().view(outputs, -1, weight.group) * weight.scales.float().unsqueeze(2)
    if weight.least is not None:
        grouped += weight.least.float().unsqueeze(2)
    return grouped.view(outputs, -1)


@triton.jit
def _values(
    q, scales_ptr, least_ptr, outs, inside, start,
    GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, HAS_LEAST: tl.constexpr,
    BLOCK_OUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(BLOCK_OUT, WIDTH) fp32 of levels that stand in GROUPS groups from input `start` on."""
    groups = start // GROUP + tl.arange(0, GROUPS)
    at = outs[:, None].to(tl.int64) * NUM_GROUPS + groups[None, :]
    there = inside[:, None] & (groups < NUM_GROUPS)[None, :]
    scale = tl.load(scales_ptr + at, mask=there, other=0.0).to(tl.float32)
    w = tl.reshape(q.to(tl.float32), [BLOCK_OUT, GROUPS, WIDTH // GROUPS]) * scale[:, :, None]
    if HAS_LEAST:
        least = tl.load(least_ptr + at, mask=there, other=0.0).to(tl.float32)
        w += least[:, :, None]
    return tl.reshape(w, [BLOCK_OUT, WIDTH])


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    scales_ptr,
    least_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    num_rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_LEAST: tl.constexpr,
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
    zero: tl.constexpr = 0 if HAS_LEAST else 8
    total = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    for start in range(0, INPUTS, BLOCK_IN):
        if BITS == 8:
            ins = start + tl.arange(0, BLOCK_IN)
            valid = ins < INPUTS
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + ins[None, :], mask=exists & valid[None, :], other=0.0
            )
            at = outs[:, None].to(tl.int64) * INPUTS + ins[None, :]
            q = tl.load(weight_ptr + at, mask=inside[:, None] & valid[None, :], other=0)
            w = _values(
                q, scales_ptr, least_ptr, outs, inside, start,
                GROUP, INPUTS // GROUP, GROUPS, HAS_LEAST, BLOCK_OUT, BLOCK_IN,
            )  # fmt: skip
            if WIDEN:
                total += tl.dot(x.to(tl.float32), tl.trans(w), input_precision="ieee")
            else:
                total += tl.dot(x, tl.trans(w.to(x.dtype)))
        else:
            pairs = start // 2 + tl.arange(0, BLOCK_IN // 2)
            valid = pairs < INPUTS // 2
            from_x = x_ptr + rows[:, None] * x_stride + 2 * pairs[None, :]
            even = tl.load(from_x, mask=exists & valid[None, :], other=0.0)
            odd = tl.load(from_x + 1, mask=exists & valid[None, :], other=0.0)
            at = outs[:, None].to(tl.int64) * (INPUTS // 2) + pairs[None, :]
            both = tl.load(weight_ptr + at, mask=inside[:, None] & valid[None, :], other=0).to(tl.int32)
            low = _values(
                (both & 15) - zero, scales_ptr, least_ptr, outs, inside, start,
                GROUP, INPUTS // GROUP, GROUPS, HAS_LEAST, BLOCK_OUT, BLOCK_IN // 2,
            )  # fmt: skip
            high = _values(
                (both >> 4) - zero, scales_ptr, least_ptr, outs, inside, start,
                GROUP, INPUTS // GROUP, GROUPS, HAS_LEAST, BLOCK_OUT, BLOCK_IN // 2,
            )  # fmt: skip
            if WIDEN:
                total += tl.dot(even.to(tl.float32), tl.trans(low), input_precision="ieee")
                total += tl.dot(odd.to(tl.float32), tl.trans(high), input_precision="ieee")
            else:
                total += tl.dot(even, tl.trans(low.to(even.dtype)))
                total += tl.dot(odd, tl.trans(high.to(odd.dtype)))
    if HAS_BIAS:
        total += tl.load(bias_ptr + outs, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_at = rows[:, None] * OUTPUTS + outs[None, :]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=exists & inside[None, :])


@triton.jit
def _expand(
    weight_ptr,
    scales_ptr,
    least_ptr,
    out_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_LEAST: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    start = tl.program_id(1) * BLOCK_IN
    inside = outs < OUTPUTS
    zero: tl.constexpr = 0 if HAS_LEAST else 8
    kept = out_ptr.dtype.element_ty
    if BITS == 8:
        ins = start + tl.arange(0, BLOCK_IN)
        valid = inside[:, None] & (ins < INPUTS)[None, :]
        at = outs[:, None].to(tl.int64) * INPUTS + ins[None, :]
        q = tl.load(weight_ptr + at, mask=valid, other=0)
        w = _values(
            q, scales_ptr, least_ptr, outs, inside, start,
            GROUP, INPUTS // GROUP, GROUPS, HAS_LEAST, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        tl.store(out_ptr + at, w.to(kept), mask=valid)
    else:
        pairs = start // 2 + tl.arange(0, BLOCK_IN // 2)
        valid = inside[:, None] & (pairs < INPUTS // 2)[None, :]
        at = outs[:, None].to(tl.int64) * (INPUTS // 2) + pairs[None, :]
        both = tl.load(weight_ptr + at, mask=valid, other=0).to(tl.int32)
        low = _values(
            (both & 15) - zero, scales_ptr, least_ptr, outs, inside, start,
            GROUP, INPUTS // GROUP, GROUPS, HAS_LEAST, BLOCK_OUT, BLOCK_IN // 2,
        )  # fmt: skip
        high = _values(
            (both >> 4) - zero, scales_ptr, least_ptr, outs, inside, start,
            GROUP, INPUTS // GROUP, GROUPS, HAS_LEAST, BLOCK_OUT, BLOCK_IN // 2,
        )  # fmt: skip
        tl.store(out_ptr + 2 * at, low.to(kept), mask=valid)
        tl.store(out_ptr + 2 * at + 1, high.to(kept), mask=valid)


def _groups(weight: IntegerWeight) -> int:
    """Groups of a block of inputs. One, where groups hold whole blocks, or there is but one."""
    inputs = weight.shape[1]
    if weight.group == inputs or weight.group % BLOCK_IN == 0:
        return 1
    assert BLOCK_IN % weight.group == 0, f"groups of {weight.group} inputs"
    return BLOCK_IN // weight.group


def expand(weight: IntegerWeight, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight in `dtype`, on its device."""
    outputs, inputs = weight.shape
    out = torch.empty((outputs, inputs), dtype=dtype, device=weight.packed.device)
    _expand[(triton.cdiv(outputs, 32), triton.cdiv(inputs, BLOCK_IN))](
        weight.packed,
        weight.scales,
        weight.scales if weight.least is None else weight.least,
        out,
        INPUTS=inputs,
        OUTPUTS=outputs,
        GROUP=weight.group,
        GROUPS=_groups(weight),
        BITS=weight.bits,
        HAS_LEAST=weight.least is not None,
        BLOCK_OUT=32,
        BLOCK_IN=BLOCK_IN,
        num_warps=4,
    )
    return out


def quantised_linear(
    x: Tensor, weight: IntegerWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x Wᵀ + b. x (N, in) fp32, bf16 or fp16, rows may be strided; returns (N, out) in `out_dtype`, None: x's dtype.

    Sums are fp32, of weights rounded to x's dtype. The reference is `x @ dequantise(weight).T + bias`.
    """
    num_rows, inputs = x.shape
    outputs = weight.shape[0]
    dtype = out_dtype or x.dtype
    if num_rows > MAX_ROWS:
        if dtype == x.dtype:
            return F.linear(x, expand(weight, x.dtype), bias)
        return torch.cat([quantised_linear(part, weight, bias, dtype) for part in x.split(MAX_ROWS)])
    x = x if x.stride(1) == 1 else x.contiguous()
    block_out = 16 if outputs <= _NARROW else 32
    out = torch.empty((num_rows, outputs), dtype=dtype, device=x.device)
    _product[(triton.cdiv(outputs, block_out),)](
        x,
        weight.packed,
        weight.scales,
        weight.scales if weight.least is None else weight.least,
        weight.scales if bias is None else bias,
        out,
        x.stride(0),
        num_rows,
        INPUTS=inputs,
        OUTPUTS=outputs,
        GROUP=weight.group,
        GROUPS=_groups(weight),
        BITS=weight.bits,
        HAS_LEAST=weight.least is not None,
        HAS_BIAS=bias is not None,
        ROWS=16 if num_rows <= 16 else 32 if num_rows <= 32 else 64,
        BLOCK_OUT=block_out,
        BLOCK_IN=BLOCK_IN,
        WIDEN=is_interpreted() or x.dtype == torch.float32,
        num_warps=4,
        num_stages=4,
    )
    return out
