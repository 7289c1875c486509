"""Owns attention of prefill chunks over paged KV memory, all chunks of a step in one launch. Decode thread.

FlashAttention-2 (Dao 2023): a block of queries walks over the keys with a running softmax. A chunk's own keys are read
from its pages too, so one path serves cached context and first chunks. The grid is a flat list of spans (`chunk_spans`)
by heads; what a span is lies on the device. A query sees keys up to itself, and all of a bidirectional prefix it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.device.contract import to_device
from worker.forward import SPAN_FIELDS, SPAN_TOKENS, chunk_spans
from worker.kernels.compiled import is_interpreted
from worker.kernels.paged_decode_attention import LOG2_E

BLOCK_KEYS = 64
_SPAN_STRIDE = tl.constexpr(SPAN_FIELDS)  # kernels may read globals only as constexpr


@dataclass(frozen=True, slots=True)
class Segments:
    """The prefill chunks of a step, uploaded once and used by every layer."""

    spans: Tensor  # (S, 5) int32 contiguous, see `worker.forward.chunk_spans`; entries of zeros are empty
    tables: Tensor  # (C, P) int32, rows may be strided; entries beyond a chunk's pages are not read


def make_segments(spans: Sequence[tuple[int, int, int, int]], tables: Sequence[Tensor]) -> Segments:
    """Pack chunks: each (first flattened token, new tokens, context, prefix tokens) and its (P,) int32 pages.

    One small copy to the device, from pinned memory so that the host does not wait for it.
    """
    cut = [span for number, chunk in enumerate(spans) for span in chunk_spans(number, *chunk)]
    packed = to_device(torch.tensor(cut, dtype=torch.int32), tables[0].device)
    if len(tables) == 1:
        stacked = tables[0].unsqueeze(0)
    else:
        stacked = torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)
    return Segments(packed, stacked)


# Not specialised: whether these are multiples of 16 differs from step to step, and a variant for each would be
# compiled while requests wait.
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
    cap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
):
    # Heads vary fastest, so the programs of spans with work come before those of empty spans.
    head = tl.program_id(0)
    span = spans_ptr + tl.program_id(1) * _SPAN_STRIDE
    num_queries = tl.load(span + 1)
    if num_queries == 0:
        return
    first = tl.load(span)
    start = tl.load(span + 2)
    prefix = tl.load(span + 3)
    table_ptr = tables_ptr + tl.load(span + 4) * table_stride
    kv_head = head // GROUP
    dims = tl.arange(0, HEAD_DIM)
    rows = tl.arange(0, BLOCK_Q)
    exists = rows < num_queries
    flat = (first + rows).to(tl.int64)
    query_at = flat[:, None] * query_stride + head * HEAD_DIM + dims[None, :]
    query = tl.load(query_ptr + query_at, mask=exists[:, None], other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    position = start + rows
    last_seen = tl.where(position < prefix, prefix - 1, position)
    stop = tl.max(tl.where(exists, last_seen, 0), 0) + 1

    best = tl.full([BLOCK_Q], -1e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    # The block's first query sees the earliest key.
    begin = 0
    if WINDOW:
        begin = tl.maximum(start - (WINDOW - 1), 0) // BLOCK_K * BLOCK_K
    for at in range(begin, stop, BLOCK_K):
        tokens = at + tl.arange(0, BLOCK_K)
        inside = tokens < stop
        pages = tl.load(table_ptr + tokens // PAGE_TOKENS, mask=inside, other=0)
        lines = pages.to(tl.int64) * PAGE_TOKENS + tokens % PAGE_TOKENS
        cache_at = (lines * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        key = tl.load(keys_ptr + cache_at, mask=inside[:, None], other=0.0)
        value = tl.load(values_ptr + cache_at, mask=inside[:, None], other=0.0)
        if WIDEN:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        seen = tokens[None, :] <= last_seen[:, None]
        if WINDOW:
            seen = seen & (tokens[None, :] > position[:, None] - WINDOW)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:  # cap · tanh(scores / cap), which is ±cap where the power overflows or vanishes
            scores = cap - 2.0 * cap / (tl.exp(2.0 * scores / cap) + 1.0)
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


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    out: Tensor,
    *,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """Attention of the chunks' queries over their pages, which hold the chunks' own keys already; returns `out`.

    query (N, H, D) and out (N, H·D): all flattened tokens of the step, rows may be strided; rows outside every
    span are neither read nor written. A chunk that begins inside its prefix holds the rest of it. keys, values
    (num_pages, page_tokens, KH, D) contiguous. D a power of two, at least 16. `window`: a query sees so many keys, itself
    counted, besides those behind it in its prefix; 0: all. Scores s become cap·tanh(s/cap) if `cap` is given. The reference is
    `worker.models.torch_attention.TorchRows`.
    """
    _, num_heads, head_dim = query.shape
    page_tokens, kv_heads = keys.shape[1:3]
    assert query.stride(2) == 1 and query.stride(1) == head_dim and out.stride(1) == 1
    assert keys.is_contiguous() and values.is_contiguous() and segments.tables.stride(1) == 1
    assert head_dim & (head_dim - 1) == 0 and num_heads % kv_heads == 0
    assert segments.spans.is_contiguous() and segments.spans.shape[1] == SPAN_FIELDS
    _attend_chunk[(num_heads, len(segments.spans))](
        query,
        keys,
        values,
        segments.spans,
        segments.tables,
        out,
        query.stride(0),
        segments.tables.stride(0),
        out.stride(0),
        LOG2_E / head_dim**0.5,
        cap * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=num_heads // kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_Q=SPAN_TOKENS,
        BLOCK_K=BLOCK_KEYS,
        WIDEN=is_interpreted() or query.dtype == torch.float32 or keys.dtype != query.dtype,
        WINDOW=window,
        CAPPED=cap > 0,
        num_warps=4,
        num_stages=2,
    )
    return out
