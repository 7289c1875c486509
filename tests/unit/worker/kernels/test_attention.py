"""Paged attention kernels and the rotary KV write against plain fp64 loops, over poisoned memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from worker.device.choices import without
from worker.kernels.paged_decode_attention import (
    DOTS,
    PLAIN,
    VARIANTS,
    choose_splits,
    paged_decode_attention,
    served,
)
from worker.kernels.prefill_attention import make_segments, prefill_attention
from worker.kernels.rotary_kv_write import rotary_kv_write

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
NAN = float("nan")


class Pages:
    """KV memory that is NaN wherever no sequence wrote, with sequences on shuffled pages."""

    def __init__(self, num_pages: int, page_tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.keys = torch.full((num_pages, page_tokens, kv_heads, head_dim), NAN).to(dtype)
        self.values = torch.full_like(self.keys, NAN)
        self.page_tokens = page_tokens
        self._free = list(range(1, num_pages))
        random.Random(0).shuffle(self._free)

    def add(self, length: int) -> list[int]:
        """A sequence of `length` random tokens; returns its pages. The last page's tail stays NaN."""
        pages = [self._free.pop() for _ in range(-(-length // self.page_tokens))]
        lines = self.lines(pages, length)
        for memory in (self.keys, self.values):
            flat = memory.view(-1, *memory.shape[2:])
            flat[lines] = torch.randn(length, *memory.shape[2:]).to(memory.dtype)
        return pages

    def lines(self, pages: list[int], length: int) -> Tensor:
        """Cache lines of a sequence's tokens."""
        at = torch.arange(length)
        return torch.tensor(pages)[at // self.page_tokens] * self.page_tokens + at % self.page_tokens

    def read(self, pages: list[int], length: int) -> tuple[Tensor, Tensor]:
        """A sequence's keys and values, (length, KH, D)."""
        lines = self.lines(pages, length)
        return self.keys.flatten(0, 1)[lines], self.values.flatten(0, 1)[lines]


def plain(
    query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None, cap: float = 0.0
) -> Tensor:
    """(S, H, D) queries over (L, KH, D) keys → (S, H·D), in fp64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("shd,lhd->hsl", query.double(), keys) / math.sqrt(query.shape[-1])
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("hsl,lhd->shd", scores.softmax(-1), values).flatten(1)


def error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN never passes a comparison."""
    return float((found.double() - expected).norm() / expected.norm())


SHAPES = [(2, 2, 64, 16), (4, 2, 128, 16), (2, 1, 64, 1), (6, 2, 16, 5), (20, 1, 16, 32)]
DTYPES = [torch.float32, torch.bfloat16]


# Splits are joined in fp32 whatever the pages hold: each shape by splits in one dtype, in turn.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens", "num_splits", "dtype"),
    [
        *((*shape, 1, dtype) for shape in SHAPES for dtype in DTYPES),
        *((*shape, 4, DTYPES[number % 2]) for number, shape in enumerate(SHAPES)),
    ],
)
def test_decode(
    heads: int, kv_heads: int, head_dim: int, page_tokens: int, num_splits: int, dtype: torch.dtype
) -> None:
    lengths = [1, page_tokens, page_tokens + 1, 64, 65, 211, 1]
    memory = Pages(900 // page_tokens + 8, page_tokens, kv_heads, head_dim, dtype)
    pages = [memory.add(length) for length in lengths[:-1]]
    # The last row is padding: page 0, length 1, and whatever earlier padding left there.
    memory.keys[0, 0], memory.values[0, 0] = 1.0, 2.0
    tables = torch.zeros(len(lengths), 230 // page_tokens + 3, dtype=torch.int32)
    for row, own in enumerate(pages):
        tables[row, : len(own)] = torch.tensor(own)
    wide = torch.randn(len(lengths), heads * head_dim + 3).to(dtype)
    query = wide[:, :-3].unflatten(1, (heads, head_dim))
    poisoned = torch.full((len(lengths), heads * head_dim + 9), NAN).to(dtype)
    found = paged_decode_attention(
        query,
        memory.keys,
        memory.values,
        tables,
        torch.tensor(lengths, dtype=torch.int32),
        2048,
        out=poisoned[:, 9:],
        num_splits=num_splits,
    )
    assert poisoned[:, :9].isnan().all()
    for row, own in enumerate(pages):
        expected = plain(query[row : row + 1], *memory.read(own, lengths[row]))
        assert error(found[row : row + 1], expected) < TOLERANCE[dtype], (row, lengths[row])
    assert (found[-1] == 2.0).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1)])
def test_every_variant_computes_the_same(heads: int, kv_heads: int) -> None:
    """Grid orders, stages, warps and registers change no bit; blocks of other sizes and dots round elsewhere."""
    lengths = [1, 130]
    memory = Pages(60, 16, kv_heads, 16, torch.float32)
    pages = [memory.add(length) for length in lengths]
    tables = torch.zeros(len(lengths), 16, dtype=torch.int32)
    for row, own in enumerate(pages):
        tables[row, : len(own)] = torch.tensor(own)
    query = torch.randn(len(lengths), heads, 16)
    counts = torch.tensor(lengths, dtype=torch.int32)
    given = (query, memory.keys, memory.values, tables, counts, 256)
    found = {
        name: paged_decode_attention(*given, num_splits=2, variant=variant)
        for name, variant in VARIANTS.items()
    }
    for row, own in enumerate(pages):
        expected = plain(query[row : row + 1], *memory.read(own, lengths[row]))
        for name, out in found.items():
            assert error(out[row : row + 1], expected) < 3e-6, (name, row)
    for name in ("bound", "bound, staged", "2 warps"):
        assert torch.equal(found[name], found["plain"]), name
    assert torch.equal(paged_decode_attention(*given, num_splits=2), found["plain"]), "what serves fp32 pages"


def test_which_variant_serves() -> None:
    """Single heads take the matrix units; groups, which do so in any variant, and fp32 pages the plain one."""
    assert served(1, is_wide=False) == DOTS
    assert served(2, is_wide=False) == served(1, is_wide=True) == PLAIN
    with without("tuned_attention"):
        assert served(1, is_wide=False) == PLAIN


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(2, 2, 0), (6, 2, 0), (2, 1, 70)])
def test_the_last_program_joins_as_a_kernel_of_its_own_does(
    heads: int, kv_heads: int, window: int, last_first: Callable[[], AbstractContextManager[None]]
) -> None:
    """Bit for bit, whoever is last; short rows leave splits empty; the counters are 0 again for the next layer."""
    lengths = [1, 64, 65, 211]
    memory = Pages(60, 16, kv_heads, 16, torch.float32)
    pages = [memory.add(length) for length in lengths]
    tables = torch.zeros(len(lengths), 16, dtype=torch.int32)
    for row, own in enumerate(pages):
        tables[row, : len(own)] = torch.tensor(own)
    query, counts = torch.randn(len(lengths), heads, 16), torch.tensor(lengths, dtype=torch.int32)
    given = (query, memory.keys, memory.values, tables, counts, 256)
    expected = paged_decode_attention(*given, num_splits=4, window=window)
    arrivals = torch.zeros(len(lengths) * kv_heads + 3, dtype=torch.int32)
    found = paged_decode_attention(*given, num_splits=4, window=window, arrivals=arrivals)
    assert torch.equal(found, expected) and not arrivals.any()
    with last_first():
        found = paged_decode_attention(*given, num_splits=4, window=window, arrivals=arrivals)
    assert torch.equal(found, expected) and not arrivals.any()


@pytest.mark.parametrize(("window", "cap"), [(1, 0.0), (70, 0.0), (64, 2.0), (0, 2.0)])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_of_layers_that_slide_or_cap(window: int, cap: float, num_splits: int) -> None:
    lengths = [1, 16, 64, 65, 71, 211]
    memory = Pages(60, 16, 2, 16, torch.float32)
    pages = [memory.add(length) for length in lengths]
    tables = torch.zeros(len(lengths), 16, dtype=torch.int32)
    for row, own in enumerate(pages):
        tables[row, : len(own)] = torch.tensor(own)
    query = torch.randn(len(lengths), 4, 16) * 3
    found = paged_decode_attention(
        query,
        memory.keys,
        memory.values,
        tables,
        torch.tensor(lengths, dtype=torch.int32),
        256,
        num_splits=num_splits,
        window=window,
        cap=cap,
    )
    for row, own in enumerate(pages):
        keys, values = (part[-window:] for part in memory.read(own, lengths[row]))
        expected = plain(query[row : row + 1], keys, values, cap=cap)
        assert error(found[row : row + 1], expected) < 3e-6, (row, lengths[row])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # where the cap is reached
def test_capped_scores_may_be_as_large_as_they_like() -> None:
    memory = Pages(20, 16, 1, 16, torch.float32)
    pages = memory.add(200)
    memory.keys.flatten(0, 1)[memory.lines(pages, 200)] *= 2000
    query = torch.randn(1, 1, 16) * 20
    tables, lengths = torch.tensor([pages], dtype=torch.int32), torch.tensor([200], dtype=torch.int32)
    found = paged_decode_attention(query, memory.keys, memory.values, tables, lengths, 256, cap=5.0)
    assert error(found, plain(query, *memory.read(pages, 200), cap=5.0)) < 1e-5


def test_decode_survives_large_scores() -> None:
    memory = Pages(20, 16, 1, 16, torch.float32)
    pages = memory.add(200)
    memory.keys.flatten(0, 1)[memory.lines(pages, 200)] *= 200
    query = torch.randn(1, 1, 16) * 20
    tables, lengths = torch.tensor([pages], dtype=torch.int32), torch.tensor([200], dtype=torch.int32)
    found = paged_decode_attention(query, memory.keys, memory.values, tables, lengths, 256, num_splits=4)
    assert error(found, plain(query, *memory.read(pages, 200))) < 1e-4


def test_splits_follow_shapes_alone() -> None:
    assert choose_splits(128, 32, 2048, 132) == 1
    assert choose_splits(1, 32, 2048, 132) == 16
    assert choose_splits(1, 8, 64, 132) == 1  # a short bound leaves nothing to share out
    assert all(choose_splits(rows, 8, 8192, 132) in (1, 2, 4, 8, 16) for rows in range(1, 130))


def seen_by(num_queries: int, context: int, prefix: int, window: int = 0) -> Tensor:
    """(S, L) bool: which keys each query attends to."""
    key, query = torch.arange(context + num_queries), torch.arange(context, context + num_queries)[:, None]
    near = key > query - window if window else key >= 0
    return ((key <= query) | ((key < prefix) & (query < prefix))) & near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "cap"),
    [(2, 2, 16, 0, 0.0), (4, 2, 64, 0, 0.0), (2, 1, 16, 1, 0.0), (2, 1, 16, 40, 0.0), (2, 1, 16, 65, 2.0)],
)
def test_prefill(
    heads: int, kv_heads: int, head_dim: int, window: int, cap: float, dtype: torch.dtype
) -> None:
    # (new tokens, cached context, bidirectional prefix)
    chunks = [(1, 0, 0), (70, 0, 66), (5, 66, 66), (64, 16, 0), (1, 127, 0), (130, 3, 133)]
    memory = Pages(80, 16, kv_heads, head_dim, dtype)
    flat, spans, tables = 2, [], []  # two decode rows come first
    for num, context, prefix in chunks:
        tables.append(torch.tensor(memory.add(num + context), dtype=torch.int32))
        spans.append((flat, num, context, prefix))
        flat += num
    query = torch.randn(flat, heads, head_dim).to(dtype)
    out = torch.full((flat, heads * head_dim), NAN).to(dtype)
    prefill_attention(
        query, memory.keys, memory.values, make_segments(spans, tables), out, window=window, cap=cap
    )
    assert out[:2].isnan().all()
    for (start, num, context, prefix), table in zip(spans, tables, strict=True):
        keys, values = memory.read(table.tolist(), num + context)
        seen = seen_by(num, context, prefix, window)
        expected = plain(query[start : start + num], keys, values, seen, cap)
        assert error(out[start : start + num], expected) < TOLERANCE[dtype], (num, context, prefix)


def rotated(x: Tensor, rotation: Tensor, pairs: bool) -> Tensor:
    """(N, H, D) fp64, its first 2·rotation.shape[1] dimensions rotated."""
    half = rotation.shape[1]
    cos, sin = rotation[:, None, :, 0].double(), rotation[:, None, :, 1].double()
    turned = x[..., : 2 * half]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if pairs else (turned[..., :half], turned[..., half:])
    first, second = a * cos - b * sin, a * sin + b * cos
    both = torch.stack([first, second], -1).flatten(-2) if pairs else torch.cat([first, second], -1)
    return torch.cat([both, x[..., 2 * half :]], -1)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"), [(3, 3, 64, 32), (4, 2, 16, 16), (5, 1, 32, 8)]
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_kv_write(
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    pairs: bool,
    qk_norm: bool,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> None:
    tokens, all_heads = 6, heads + 2 * kv_heads
    qkv = torch.randn(tokens, all_heads * head_dim).to(dtype)
    qkv[2, 5], qkv[3, head_dim * heads + 1], qkv[4, -1] = NAN, float("inf"), float("-inf")
    angles = torch.rand(tokens, rotary_dim // 2) * 6
    rotation = torch.stack([angles.cos(), angles.sin()], -1)
    weight = torch.rand(heads + kv_heads, head_dim) + 0.5 if qk_norm else None
    keys = torch.full((4, 5, kv_heads, head_dim), NAN).to(kv_dtype)
    values = torch.full_like(keys, NAN)
    write_index = torch.tensor([0, 7, 19, 12, 5, 0])  # two padding rows share line 0
    query = rotary_kv_write(
        qkv, rotation, write_index, keys, values, heads, pairs=pairs, qk_weight=weight, eps=1e-6
    )
    x = qkv.double().nan_to_num(0.0, 0.0, 0.0).view(tokens, all_heads, head_dim)
    qk = x[:, : heads + kv_heads]
    if weight is not None:
        qk = qk * (qk.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    qk = rotated(qk, rotation, pairs)
    limit = TOLERANCE[dtype if dtype == kv_dtype else torch.float32]
    assert query.dtype == kv_dtype and error(query, qk[:, :heads]) < limit
    lines = write_index[1:5]
    assert error(keys.flatten(0, 1)[lines], qk[1:5, heads:]) < limit
    assert error(values.flatten(0, 1)[lines], x[1:5, heads + kv_heads :]) < limit
    assert keys.flatten(0, 1)[0].isfinite().all()
    untouched = [line for line in range(20) if line not in write_index]
    assert keys.flatten(0, 1)[untouched].isnan().all() and values.flatten(0, 1)[untouched].isnan().all()
