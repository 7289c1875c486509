"""Owns the activations between an MLP's products: tanh GELU, and SiLU and GELU gates. Decode thread.

Both may write into part of a wider buffer, so that a product over two inputs needs no concatenation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.dependent import await_inputs, launch_options

BLOCK = 1024


@triton.jit
def activate_block(
    row,
    block,
    x_ptr,
    out_ptr,
    x_stride,
    out_stride,
    DIM: tl.constexpr,
    SILU: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row."""
    dims = block * BLOCK + tl.arange(0, BLOCK)
    inside = dims < DIM
    x = tl.load(x_ptr + row * x_stride + dims, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = x / (1.0 + tl.exp(-x))
    else:
        # 0.5·x·(1 + tanh z) is x·sigmoid(2z), which has no overflow to guard against.
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * z))
    if GATED:
        y *= tl.load(x_ptr + row * x_stride + DIM + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + dims, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activate(
    x_ptr,
    out_ptr,
    x_stride,
    out_stride,
    DIM: tl.constexpr,
    SILU: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    activate_block(row, tl.program_id(1), x_ptr, out_ptr, x_stride, out_stride, DIM, SILU, GATED, BLOCK)


def _launch(x: Tensor, dim: int, out: Tensor | None, *, silu: bool, gated: bool) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], dim), dtype=x.dtype, device=x.device)
    assert x.stride(1) == 1 and out.stride(1) == 1 and out.shape == (x.shape[0], dim)
    _activate[(x.shape[0], triton.cdiv(dim, BLOCK))](
        x, out, x.stride(0), out.stride(0),
        DIM=dim, SILU=silu, GATED=gated, BLOCK=BLOCK, num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out


def gelu_tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU, tanh approximation. x (N, F) → (N, F); rows of both may be strided."""
    return _launch(x, x.shape[1], out, silu=False, gated=False)


def silu_gate(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up (Shazeer 2020). gate_up (N, 2F), gate first → (N, F); rows of both may be strided."""
    return _launch(gate_up, gate_up.shape[1] // 2, out, silu=True, gated=True)


def gelu_gate(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(gate) · up, tanh approximation. gate_up (N, 2F), gate first → (N, F); rows of both may be strided."""
    return _launch(gate_up, gate_up.shape[1] // 2, out, silu=False, gated=True)
