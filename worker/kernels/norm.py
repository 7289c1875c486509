"""Owns LayerNorm and RMSNorm with the residual sum in front of them, each one pass over its row. Decode thread.

A row stays in registers between its sum, its moments and its output, so memory is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import next_power_of_two
from worker.kernels.dependent import await_inputs, launch_options


@triton.jit
def _norm_row(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < DIM
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    await_inputs(DEPENDENT)
    x = tl.load(x_ptr + row * x_stride + dims, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + dims, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * DIM + dims, rounded, mask=inside)
        x = rounded.to(tl.float32)  # the norm is taken of the rounded sum, which later layers read
    if CENTRED:
        mean = tl.sum(x, 0) / DIM
        x = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
    y = x * scale * weight
    if CENTRED:
        y += tl.load(bias_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * DIM + dims, y.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, dim = x.shape
    assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    out = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    block = next_power_of_two(dim)
    _norm_row[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        weight if bias is None else bias,
        total,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        DIM=dim,
        BLOCK=block,
        CENTRED=bias is not None,
        RESIDUAL=residual is not None,
        **launch_options(x.device),
        num_warps=min(16, max(1, block // 256)),
    )
    return total, out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x + residual, LayerNorm of it); without a residual (x itself, LayerNorm of x).

    x, residual (N, D), rows may be strided, any float dtype; weight, bias (D,). Results have x's dtype; the sum is
    rounded to it before its norm is taken. The reference is `torch.layer_norm`.
    """
    return _launch(x, weight, bias, eps, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x + residual, RMSNorm of it); shapes as for `layer_norm`. The reference is `torch.nn.functional.rms_norm`."""
    return _launch(x, weight, None, eps, residual)
