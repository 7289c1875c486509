"""Owns decode attention over paged KV memory: one query a row, the sequence split over programs. Decode thread.

Flash-decoding (Dao, Haziza, Massa, Sizov 2023): `num_splits` programs share a sequence's tokens, each with a running
softmax, and a second kernel joins their parts, or the last of them to end. The number of splits depends on shapes alone and their length on the row's
length, read on the device, so a captured graph serves rows of any length. Pages as in vLLM (Kwon et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.device.choices import choices
from worker.kernels.compiled import is_interpreted, next_power_of_two, num_multiprocessors
from worker.kernels.dependent import await_inputs, launch_options

LOG2_E = 1.4426950408889634
MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """How the kernel is laid out on the device; every variant computes the same, `dots` up to rounding."""

    block_tokens: int = 64
    num_warps: int = 4
    stages: int = 3  # of loads ahead of their use
    staged: bool = (
        False  # the loop itself asks for the stages: the compiler else pipelines only loads of a `tl.dot`
    )
    most_registers: int | None = None  # a thread; None: as many as the compiler likes
    heads_first: bool = (
        False  # programs of one token range, a head each, run beside each other, for they share pages
    )
    dots: bool = False  # one head a key through the matrix units, padded to 16 rows
    programs: int = 4  # a multiprocessor, wanted: enough loads in flight to fill the memory system


PLAIN = Variant()
# The quickest of all measured, on an H200 at 1, 8 and 32 rows of 32 heads: 6.4, 18.5 and 57 µs, where `PLAIN` took 9.9, 25.9 and 102.
DOTS = Variant(heads_first=True, dots=True, num_warps=2)
# 70 registers a thread make 7 programs a multiprocessor, and the eighth a second, nearly empty wave; 64 spill nothing.
BOUND = Variant(most_registers=64, heads_first=True)
VARIANTS = {
    "plain": PLAIN,
    "dots": DOTS,
    "dots, 1 warp": replace(DOTS, num_warps=1),
    "dots, 4 warps": replace(DOTS, num_warps=4),
    "dots, 128 tokens": replace(DOTS, block_tokens=128),
    "dots, 8 programs": replace(DOTS, programs=8),
    "dots, 2 programs": replace(DOTS, programs=2),
    "2 warps": Variant(num_warps=2, heads_first=True),
    "2 warps, 32 tokens": Variant(num_warps=2, heads_first=True, block_tokens=32),
    "bound": BOUND,
    "bound, staged": replace(BOUND, staged=True),
    "bound, 128 tokens": replace(BOUND, block_tokens=128, num_warps=8),
}
"""What `loadtest.gpu.kernels` measures beside each other."""


def served(group: int, *, is_wide: bool) -> Variant:
    """The variant for so many query heads a key; `is_wide`: fp32 pages, which no matrix unit takes. Groups of heads go
    through the matrix units in any variant, and the plainest was the quickest of those."""
    return DOTS if choices().tuned_attention and group == 1 and not is_wide else PLAIN


@triton.jit
def _join_head(
    part_ptr, stats_ptr, out_ptr, out_stride, row, head, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """Join one head's parts, read past the L1, which other multiprocessors do not write to."""
    dims = tl.arange(0, HEAD_DIM)
    splits = tl.arange(0, NUM_SPLITS)
    part = (row * NUM_HEADS + head) * NUM_SPLITS + splits
    best = tl.load(stats_ptr + part * 2, cache_modifier=".cg")
    total = tl.load(stats_ptr + part * 2 + 1, cache_modifier=".cg")
    mixed = tl.load(part_ptr + part[:, None] * HEAD_DIM + dims[None, :], cache_modifier=".cg")
    fade = tl.exp2(best - tl.max(best, 0))
    result = tl.sum(mixed * fade[:, None], 0) / tl.maximum(tl.sum(total * fade, 0), 1e-30)
    out_at = row.to(tl.int64) * out_stride + head * HEAD_DIM + dims
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=["tables_ptr", "lengths_ptr"])  # views into a packed buffer
def _attend_split(
    query_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    lengths_ptr,
    out_ptr,
    part_ptr,
    stats_ptr,
    arrivals_ptr,
    query_stride,
    table_stride,
    out_stride,
    scale,
    cap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    STAGES: tl.constexpr,
    JOINS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_inputs(DEPENDENT)
    if HEADS_FIRST:
        kv_head = tl.program_id(0)
        split = tl.program_id(1)
        row = tl.program_id(2)
    else:
        row = tl.program_id(0)
        kv_head = tl.program_id(1)
        split = tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    # A split is a number of whole blocks; a short row leaves its last splits empty.
    first = 0
    if WINDOW:
        first = tl.maximum(length - WINDOW, 0)
    num_blocks = (length - first + BLOCK - 1) // BLOCK
    share = (num_blocks + NUM_SPLITS - 1) // NUM_SPLITS * BLOCK
    start = first + split * share
    stop = tl.minimum(start + share, length)

    dims = tl.arange(0, HEAD_DIM)
    group = tl.arange(0, BLOCK_GROUP)
    heads = kv_head * GROUP + group
    query_at = row.to(tl.int64) * query_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(query_ptr + query_at, mask=(group < GROUP)[:, None], other=0.0)
    if BLOCK_GROUP == 1:
        single = tl.sum(query.to(tl.float32), 0)  # (HEAD_DIM,): the block has this one head
    elif WIDEN:
        query = query.to(tl.float32)

    # The running maximum starts low but finite: (-inf) - (-inf) would make the empty split NaN.
    best = tl.full([BLOCK_GROUP], -1e30, tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, HEAD_DIM], tl.float32)
    for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
        tokens = at + tl.arange(0, BLOCK)
        seen = tokens < stop
        pages = tl.load(
            tables_ptr + row.to(tl.int64) * table_stride + tokens // PAGE_TOKENS, mask=seen, other=0
        )
        lines = pages.to(tl.int64) * PAGE_TOKENS + tokens % PAGE_TOKENS
        cache_at = (lines * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        key = tl.load(keys_ptr + cache_at, mask=seen[:, None], other=0.0)
        value = tl.load(values_ptr + cache_at, mask=seen[:, None], other=0.0)
        if BLOCK_GROUP == 1:
            # One query a key: matrix units would need at least 16 rows.
            scores = tl.sum(key.to(tl.float32) * single[None, :], 1)[None, :]
        elif WIDEN:
            scores = tl.dot(query, tl.trans(key.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores *= scale
        if CAPPED:  # cap · tanh(scores / cap), which is ±cap where the power overflows or vanishes
            scores = cap - 2.0 * cap / (tl.exp(2.0 * scores / cap) + 1.0)
        scores = tl.where(seen[None, :], scores, -1e30)
        new_best = tl.maximum(best, tl.max(scores, 1))
        fade = tl.exp2(best - new_best)
        weights = tl.where(seen[None, :], tl.exp2(scores - new_best[:, None]), 0.0)
        total = total * fade + tl.sum(weights, 1)
        if BLOCK_GROUP == 1:
            flat = tl.sum(weights, 0)
            gained = tl.sum(value.to(tl.float32) * flat[:, None], 0)[None, :]
        elif WIDEN:
            gained = tl.dot(weights, value.to(tl.float32), input_precision="ieee")
        else:
            gained = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        mixed = mixed * fade[:, None] + gained
        best = new_best

    mine = (group < GROUP)[:, None]
    if NUM_SPLITS == 1:
        result = mixed / tl.maximum(total, 1e-30)[:, None]
        out_at = row.to(tl.int64) * out_stride + heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=mine)
    else:
        part = (row * (KV_HEADS * GROUP) + heads) * NUM_SPLITS + split
        tl.store(part_ptr + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=mine)
        tl.store(stats_ptr + part * 2, best, mask=group < GROUP)
        tl.store(stats_ptr + part * 2 + 1, total, mask=group < GROUP)
        if JOINS:
            tl.debug_barrier()  # every thread has written before one of them tells that this program has arrived
            mark = arrivals_ptr + row * KV_HEADS + kv_head
            arrived = tl.atomic_add(mark, 1, sem="acq_rel", scope="gpu")
            if arrived == NUM_SPLITS - 1:
                tl.store(mark, 0)  # for the next layer
                for number in range(GROUP):
                    _join_head(
                        part_ptr, stats_ptr, out_ptr, out_stride, row, kv_head * GROUP + number,
                        KV_HEADS * GROUP, HEAD_DIM, NUM_SPLITS,
                    )  # fmt: skip


@triton.jit
def _join_splits(
    part_ptr,
    stats_ptr,
    out_ptr,
    out_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_inputs(DEPENDENT)
    row, head = tl.program_id(0), tl.program_id(1)
    _join_head(part_ptr, stats_ptr, out_ptr, out_stride, row, head, NUM_HEADS, HEAD_DIM, NUM_SPLITS)


def choose_splits(
    num_rows: int, kv_heads: int, max_tokens: int, num_processors: int, variant: Variant = PLAIN
) -> int:
    """How many programs share one row and key head: a power of two, from shapes alone (graph-safe)."""
    wanted = variant.programs * num_processors
    most = min(MAX_SPLITS, -(-max_tokens // variant.block_tokens))
    splits = 1
    while 2 * splits <= most and num_rows * kv_heads * splits < wanted:
        splits *= 2
    return splits


def paged_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    max_tokens: int,
    *,
    out: Tensor | None = None,
    num_splits: int | None = None,
    window: int = 0,
    cap: float = 0.0,
    variant: Variant | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Each row's query against the first `lengths[row]` tokens of its pages, or the last `window` of them.

    query (B, H, D), rows may be strided; keys, values (num_pages, page_tokens, KH, D) contiguous, H a multiple
    of KH, D a power of two; block_tables (B, P) int32; lengths (B,) int32, at least 1 and at most `max_tokens`.
    out (B, H·D), rows may be strided; made in the query's dtype if not given. Scores s are scaled by 1/sqrt(D),
    and then cap·tanh(s/cap) if `cap` is given. `variant`: how it is laid out, by default as `choices` says. `arrivals`,
    at least B·KH int32, all 0: then the last program of a head joins its parts, and leaves them 0; they belong to launches that
    follow each other on one stream. The reference is `worker.models.attention.AttentionPlan`.
    """
    num_rows, num_heads, head_dim = query.shape
    page_tokens, kv_heads = keys.shape[1:3]
    assert query.stride(2) == 1 and query.stride(1) == head_dim
    assert keys.is_contiguous() and values.is_contiguous() and block_tables.stride(1) == 1
    assert head_dim & (head_dim - 1) == 0 and num_heads % kv_heads == 0
    if out is None:
        out = torch.empty((num_rows, num_heads * head_dim), dtype=query.dtype, device=query.device)
    group = num_heads // kv_heads
    if group > 1:
        arrivals = None  # one program would join the heads of a group one after another: measured, 1.2 to 1.7 times as long
    assert out.stride(1) == 1 and (arrivals is None or arrivals.numel() >= num_rows * kv_heads)
    laid = variant or served(group, is_wide=keys.dtype == torch.float32)
    if num_splits is None:
        most = min(max_tokens, window) if window else max_tokens
        num_splits = choose_splits(num_rows, kv_heads, most, num_multiprocessors(query.device), laid)
    parts = stats = out  # placeholders: with one split these are not read
    if num_splits > 1:
        parts = torch.empty(
            (num_rows, num_heads, num_splits, head_dim), dtype=torch.float32, device=query.device
        )
        stats = torch.empty((num_rows, num_heads, num_splits, 2), dtype=torch.float32, device=query.device)
    options = launch_options(query.device)
    grid = (kv_heads, num_splits, num_rows) if laid.heads_first else (num_rows, kv_heads, num_splits)
    _attend_split[grid](
        query,
        keys,
        values,
        block_tables,
        lengths,
        out,
        parts,
        stats,
        out if arrivals is None else arrivals,
        query.stride(0),
        block_tables.stride(0),
        out.stride(0),
        LOG2_E / head_dim**0.5,  # exponentials are powers of two
        cap * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_GROUP=1 if group == 1 and not laid.dots else max(16, next_power_of_two(group)),
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        NUM_SPLITS=num_splits,
        BLOCK=laid.block_tokens,
        WIDEN=is_interpreted() or query.dtype == torch.float32 or keys.dtype != query.dtype,
        WINDOW=window,
        CAPPED=cap > 0,
        HEADS_FIRST=laid.heads_first,
        STAGES=laid.stages if laid.staged else None,
        JOINS=arrivals is not None,
        **options,
        num_warps=laid.num_warps,
        num_stages=laid.stages,
        maxnreg=laid.most_registers,
    )
    if num_splits > 1 and arrivals is None:
        _join_splits[(num_rows, num_heads)](
            parts,
            stats,
            out,
            out.stride(0),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            NUM_SPLITS=num_splits,
            **options,
            num_warps=2,
        )
    return out
