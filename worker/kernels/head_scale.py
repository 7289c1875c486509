"""Owns scaling q and v of each head by content and position, as Moondream 3's attention has it. Decode thread."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import next_power_of_two
from worker.kernels.dependent import await_inputs, launch_options


@triton.jit
def _scale_heads(
    qkv_ptr,
    content_ptr,
    alpha_ptr,
    log_ptr,
    qkv_stride,
    content_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """All heads of q, or of v, of one row."""
    await_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # 0: q, 1: v
    heads = tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_DIM)
    exists = heads < HEADS
    content = tl.load(content_ptr + row * content_stride + part * HEADS + heads, mask=exists, other=0.0)
    alpha = tl.load(alpha_ptr + heads, mask=exists, other=0.0)
    # tanh(z) is 2·sigmoid(2z) − 1, which has no overflow to guard against.
    factor = 2.0 / (1.0 + tl.exp(-2.0 * content.to(tl.float32))) - 1.0
    factor += 0.5 + 1.0 / (1.0 + tl.exp(-alpha * tl.load(log_ptr + row)))
    at = row * qkv_stride + part * (2 * HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    values = tl.load(qkv_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(qkv_ptr + at, values.to(qkv_ptr.dtype.element_ty), mask=inside)


def scale_heads(qkv: Tensor, content: Tensor, alpha: Tensor, log_positions: Tensor, num_heads: int) -> None:
    """Multiply q and v of `qkv` (N, 3·H·D), in place, each head by tanh(content) + 0.5 + sigmoid(α · log_position), in fp32.

    content (N, 2·H): for q, then for v; alpha (H,) and log_positions (N, 1) fp32. Rows of the first two may be strided. The
    reference is `worker.models.moondream3.Tau`.
    """
    rows, width = qkv.shape
    assert qkv.stride(1) == 1 and content.stride(1) == 1 and content.shape == (rows, 2 * num_heads)
    head_dim = width // (3 * num_heads)
    _scale_heads[(rows, 2)](
        qkv,
        content,
        alpha,
        log_positions,
        qkv.stride(0),
        content.stride(0),
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=next_power_of_two(num_heads),
        BLOCK_DIM=next_power_of_two(head_dim),
        num_warps=4,
        **launch_options(qkv.device),
    )
