"""Owns the step between the fused qkv product and attention, in one kernel: q/k norms, rotation, KV write. Decode thread.

Rotary embedding (Su et al. 2021) of the first `rotary_dim` dimensions of each q and k head, in fp32. Two layouts
of a rotated pair: side by side ("pairs", what models here permute their weights to) or half of `rotary_dim` apart
("halves", NeoX). Each element also loads its partner; the second load hits the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.activation import activate_block
from worker.kernels.dependent import await_inputs, launch_options

BLOCK_HEADS = 8
DIM_BLOCK = 1024  # of an activation in the same launch


@triton.jit
def _finite(x):
    """NaN and both infinities become 0: a NaN left in a page would spoil the page's next owner even where it is masked."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def rotate_heads(
    token,
    block,
    qkv_ptr,
    rotation_ptr,
    write_index_ptr,
    weight_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    qkv_stride,
    rotation_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm, rotate and store one block of a token's heads."""
    heads = block * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    num_rotated: tl.constexpr = NUM_HEADS + KV_HEADS
    exists = (heads < num_rotated + KV_HEADS)[:, None]
    source = qkv_ptr + token * qkv_stride + heads[:, None] * HEAD_DIM
    x = _finite(tl.load(source + dims[None, :], mask=exists, other=0.0).to(tl.float32))

    turned = dims < ROTARY_DIM
    if PAIRS:
        partner = tl.where(turned, dims ^ 1, dims)
        angle = dims // 2
        first = dims % 2 == 0
    else:
        half: tl.constexpr = ROTARY_DIM // 2
        first = dims < half
        partner = tl.where(turned, tl.where(first, dims + half, dims - half), dims)
        angle = tl.where(first, dims, dims - half)
    is_rotated = (heads < num_rotated)[:, None]
    y = _finite(tl.load(source + partner[None, :], mask=exists & is_rotated, other=0.0).to(tl.float32))
    if QK_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        row = weight_ptr + heads[:, None] * HEAD_DIM
        normed = x * scale * tl.load(row + dims[None, :], mask=is_rotated, other=1.0)
        y = y * scale * tl.load(row + partner[None, :], mask=is_rotated, other=1.0)
        x = tl.where(is_rotated, normed, x)
    at = rotation_ptr + token * rotation_stride + angle * 2
    cos = tl.load(at, mask=turned, other=1.0)
    sin = tl.load(at + 1, mask=turned, other=0.0)
    sin = tl.where(first, -sin, sin)
    x = tl.where(is_rotated, x * cos[None, :] + y * sin[None, :], x)

    query_at = (token * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(query_ptr + query_at, x.to(query_ptr.dtype.element_ty), mask=(heads < NUM_HEADS)[:, None])
    line = tl.load(write_index_ptr + token).to(tl.int64)
    is_key = (heads >= NUM_HEADS) & (heads < num_rotated)
    key_at = (line * KV_HEADS + heads - NUM_HEADS)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(keys_ptr + key_at, x.to(keys_ptr.dtype.element_ty), mask=is_key[:, None])
    is_value = (heads >= num_rotated) & (heads < num_rotated + KV_HEADS)
    value_at = (line * KV_HEADS + heads - num_rotated)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(values_ptr + value_at, x.to(values_ptr.dtype.element_ty), mask=is_value[:, None])


@triton.jit(do_not_specialize_on_alignment=["write_index_ptr"])
def _rotate_and_write(
    qkv_ptr,
    rotation_ptr,
    write_index_ptr,
    weight_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    qkv_stride,
    rotation_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_inputs(DEPENDENT)
    rotate_heads(
        tl.program_id(0).to(tl.int64), tl.program_id(1), qkv_ptr, rotation_ptr, write_index_ptr, weight_ptr,
        query_ptr, keys_ptr, values_ptr, qkv_stride, rotation_stride, eps,
        NUM_HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, PAIRS, QK_NORM, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["write_index_ptr"])
def _rotate_write_and_gelu(
    qkv_ptr,
    rotation_ptr,
    write_index_ptr,
    weight_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    inner_ptr,
    out_ptr,
    qkv_stride,
    rotation_stride,
    inner_stride,
    out_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if block < HEAD_BLOCKS:
        rotate_heads(
            token, block, qkv_ptr, rotation_ptr, write_index_ptr, weight_ptr,
            query_ptr, keys_ptr, values_ptr, qkv_stride, rotation_stride, eps,
            NUM_HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, PAIRS, QK_NORM, BLOCK,
        )  # fmt: skip
    else:
        activate_block(
            token,
            block - HEAD_BLOCKS,
            inner_ptr,
            out_ptr,
            inner_stride,
            out_stride,
            DIM,
            False,
            False,
            DIM_BLOCK,
        )


def rotary_kv_write(
    qkv: Tensor,
    rotation: Tensor,
    write_index: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    *,
    pairs: bool = True,
    qk_weight: Tensor | None = None,
    eps: float = 1e-6,
    gelu: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rotate q and k, write k and v to the cache lines `write_index`; returns q (N, H, D) in the cache's dtype.

    qkv (N, (H + 2·KH)·D), rows may be strided: q heads, then k, then v. rotation (N, R/2, 2) fp32: cosine and
    sine of each token's angles, R ≤ D even. write_index (N,) int32 or int64. keys, values (num_pages, page_tokens, KH, D)
    contiguous; D a power of two. qk_weight (H + KH, D) fp32: RMS norm of each q and k head before the rotation
    (Qwen3), in the same order of dimensions as qkv. Values that are not finite become 0. `gelu`: two tensors (N, F), rows
    may be strided; the second becomes the GELU (tanh approximation) of the first in the same launch.
    """
    num_tokens = qkv.shape[0]
    kv_heads, head_dim = keys.shape[2:]
    assert qkv.shape[1] == (num_heads + 2 * kv_heads) * head_dim and qkv.stride(1) == 1
    assert rotation.dtype == torch.float32 and rotation.shape[2] == 2 and rotation.stride(1) == 2
    assert keys.is_contiguous() and values.is_contiguous()
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=keys.dtype, device=qkv.device)
    head_blocks = triton.cdiv(num_heads + 2 * kv_heads, BLOCK_HEADS)
    given = (qkv, rotation, write_index, rotation if qk_weight is None else qk_weight, query, keys, values)
    heads = {
        "NUM_HEADS": num_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": 2 * rotation.shape[1],
        "PAIRS": pairs,
        "QK_NORM": qk_weight is not None,
        "BLOCK": BLOCK_HEADS,
        **launch_options(qkv.device),
    }
    strides = (qkv.stride(0), rotation.stride(0))
    if gelu is None:
        _rotate_and_write[(num_tokens, head_blocks)](*given, *strides, eps, **heads, num_warps=4)
        return query
    inner, out = gelu
    dim = inner.shape[1]
    assert inner.stride(1) == 1 and out.stride(1) == 1 and out.shape == inner.shape == (num_tokens, dim)
    _rotate_write_and_gelu[(num_tokens, head_blocks + triton.cdiv(dim, DIM_BLOCK))](
        *given, inner, out, *strides, inner.stride(0), out.stride(0), eps,
        **heads, HEAD_BLOCKS=head_blocks, DIM=dim, DIM_BLOCK=DIM_BLOCK, num_warps=4,
    )  # fmt: skip
    return query
