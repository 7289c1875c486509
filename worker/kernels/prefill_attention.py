"""Owns attention of prefill chunks over paged KV memory, all chunks of a step in one launch. Decode thread.

FlashAttention-2 (Dao 2023): a block of queries walks over the keys with a running softmax. A chunk's own keys
are read from its pages as well: they were written just before, and one path serves cached context, prefix-cache
hits and first chunks alike. A query sees keys up to itself, and the whole bidirectional prefix if it lies in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.device.base import to_device
from worker.kernels.compiled import is_interpreted

BLOCK_QUERIES = 64
BLOCK_KEYS = 64
SEGMENT_FIELDS = 4


@dataclass(frozen=True, slots=True)
class Segments:
    """The prefill chunks of a step, uploaded once and used by every layer."""

    spans: Tensor  # (S, 4) int32: first flattened token, new tokens, cached context, prefix tokens
    tables: Tensor  # (S, P) int32, rows may be strided; entries beyond a chunk's pages are not read
    max_queries: int


def make_segments(spans: Sequence[tuple[int, int, int, int]], tables: Sequence[Tensor]) -> Segments:
    """Pack chunks: each (first flattened token, new tokens, context, prefix tokens) and its (P,) int32 pages.

    One small copy to the device, from pinned memory so that the host does not wait for it.
    """
    packed = to_device(torch.tensor(spans, dtype=torch.int32), tables[0].device)
    if len(tables) == 1:
        stacked = tables[0].unsqueeze(0)
    else:
        stacked = torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)
    return Segments(packed, stacked, max(span[1] for span in spans))


# Whether these happen to be multiples of 16 differs from step to step; a variant for each would be compiled while
# requests wait.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["spans_ptr", "tables_ptr"])
def _attend_chunk(
    query_ptr,
    keys_ptr,
    values_ptr,
    spans_ptr,
    tables_ptr,
    out_ptr,
    query_stride,
    table_stride,
    out_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    segment = tl.program_id(2)
    first = tl.load(spans_ptr + segment * 4)
    num_queries = tl.load(spans_ptr + segment * 4 + 1)
    context = tl.load(spans_ptr + segment * 4 + 2)
    prefix = tl.load(spans_ptr + segment * 4 + 3)
    # Last blocks first: they see the most keys, and the short ones then fill the gaps at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if block * BLOCK_Q >= num_queries:
        return
    head = tl.program_id(1)
    kv_head = head // GROUP
    dims = tl.arange(0, HEAD_DIM)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = rows < num_queries
    flat = (first + rows).to(tl.int64)
    query_at = flat[:, None] * query_stride + head * HEAD_DIM + dims[None, :]
    query = tl.load(query_ptr + query_at, mask=exists[:, None], other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    num_keys = context + num_queries
    position = context + rows
    last_seen = tl.minimum(tl.where(position < prefix, prefix - 1, position), num_keys - 1)
    stop = tl.max(tl.where(exists, last_seen, 0), 0) + 1

    best = tl.full([BLOCK_Q], -1e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    for at in range(0, stop, BLOCK_K):
        tokens = at + tl.arange(0, BLOCK_K)
        inside = tokens < stop
        pages = tl.load(tables_ptr + segment * table_stride + tokens // PAGE_TOKENS, mask=inside, other=0)
        lines = pages.to(tl.int64) * PAGE_TOKENS + tokens % PAGE_TOKENS
        cache_at = (lines * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        key = tl.load(keys_ptr + cache_at, mask=inside[:, None], other=0.0)
        value = tl.load(values_ptr + cache_at, mask=inside[:, None], other=0.0)
        if WIDEN:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        seen = tokens[None, :] <= last_seen[:, None]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen, scores, -1e30)
        new_best = tl.maximum(best, tl.max(scores, 1))
        fade = tl.exp2(best - new_best)
        weights = tl.where(seen, tl.exp2(scores - new_best[:, None]), 0.0)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        best = new_best
    out_at = flat[:, None] * out_stride + head * HEAD_DIM + dims[None, :]
    result = mixed / tl.maximum(total, 1e-30)[:, None]
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=exists[:, None])


def prefill_attention(query: Tensor, keys: Tensor, values: Tensor, segments: Segments, out: Tensor) -> Tensor:
    """Attention of the chunks' queries over their pages, which hold the chunks' own keys already; returns `out`.

    query (N, H, D) and out (N, H·D): all flattened tokens of the step, rows may be strided; rows outside every
    chunk are neither read nor written. keys, values (num_pages, page_tokens, KH, D) contiguous. D a power of two,
    at least 16. The reference is `worker.models.attention.AttentionPlan`.
    """
    _, num_heads, head_dim = query.shape
    page_tokens, kv_heads = keys.shape[1:3]
    assert query.stride(2) == 1 and query.stride(1) == head_dim and out.stride(1) == 1
    assert keys.is_contiguous() and values.is_contiguous() and segments.tables.stride(1) == 1
    assert head_dim & (head_dim - 1) == 0 and num_heads % kv_heads == 0
    blocks = triton.cdiv(segments.max_queries, BLOCK_QUERIES)
    _attend_chunk[(blocks, num_heads, len(segments.spans))](
        query,
        keys,
        values,
        segments.spans,
        segments.tables,
        out,
        query.stride(0),
        segments.tables.stride(0),
        out.stride(0),
        1.4426950408889634 / head_dim**0.5,
        KV_HEADS=kv_heads,
        GROUP=num_heads // kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_Q=BLOCK_QUERIES,
        BLOCK_K=BLOCK_KEYS,
        WIDEN=is_interpreted() or query.dtype == torch.float32 or keys.dtype != query.dtype,
        num_warps=4,
        num_stages=2,
    )
    return out
