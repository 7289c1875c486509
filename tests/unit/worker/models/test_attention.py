"""Paged attention against a plain loop over positions."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from worker.forward import DecodeRows, KVCache, PrefillSegment, StepTokens
from worker.models.attention import AttentionPlan
from worker.models.torch_attention import GatherSpace, LayerAttention

PAGE_TOKENS, HEAD_DIM = 4, 16


def plain(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, cap: float = 0.0) -> Tensor:
    """(S, H, D) queries over (L, KH, D) keys with (S, L) allowed → (S, H·D), in fp64, one head at a time."""
    group = query.shape[1] // keys.shape[1]
    out = []
    for head in range(query.shape[1]):
        q, k, v = query[:, head].double(), keys[:, head // group].double(), values[:, head // group].double()
        scores = q @ k.t() / math.sqrt(q.shape[-1])
        if cap:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~allowed, float("-inf"))
        out.append(scores.softmax(-1) @ v)
    return torch.stack(out, dim=1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "kind",
    [LayerAttention(), LayerAttention(1), LayerAttention(5), LayerAttention(9, 1.5), LayerAttention(cap=2.0)],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_against_plain_loop(
    seed: int, kind: LayerAttention, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_layers, num_pages = 2, 120
    free = list(range(1, num_pages))
    rng.shuffle(free)
    shape = (num_pages, PAGE_TOKENS, kv_heads, HEAD_DIM)
    cache = KVCache(
        keys=[torch.randn(shape).to(dtype) for _ in range(num_layers)],
        values=[torch.randn(shape).to(dtype) for _ in range(num_layers)],
        page_tokens=PAGE_TOKENS,
    )

    def pages_for(count: int) -> list[int]:
        return [free.pop() for _ in range(-(-count // PAGE_TOKENS))]

    lines: list[int] = []
    spans: list[tuple[list[int], int, int, int]] = []  # pages, first new position, length, prefix
    lengths = [rng.randint(1, 30) for _ in range(rng.randint(0, 5))]
    rows = [pages_for(length) for length in lengths]
    spans += [(pages, length - 1, length, 0) for pages, length in zip(rows, lengths, strict=True)]
    segments = []
    for _ in range(rng.randint(0 if rows else 1, 3)):
        context, count = rng.choice([0, rng.randint(1, 12)]), rng.randint(1, 14)
        prefix = rng.choice([0, rng.randint(0, context + count)])
        pages = pages_for(context + count)
        segments.append(PrefillSegment(count, context, prefix, torch.tensor([*pages, 0], dtype=torch.int32)))
        spans.append((pages, context, context + count, prefix))
    for pages, first, length, _ in spans:
        lines += [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in range(first, length)]
    decode = None
    if rows:
        width = max(map(len, rows)) + 1
        tables = torch.zeros(len(rows), width, dtype=torch.int32)
        for index, pages in enumerate(rows):
            tables[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        bound = max(lengths) + rng.randint(0, 9)
        decode = DecodeRows(len(rows), tables, torch.tensor(lengths, dtype=torch.int32), bound)
    tokens = StepTokens(torch.zeros(len(lines), dtype=torch.long), torch.tensor(lines), decode, segments)
    plan = AttentionPlan(tokens, cache, GatherSpace() if seed % 2 else None)
    for layer in range(num_layers):
        qkv = torch.randn(len(lines), heads + 2 * kv_heads, HEAD_DIM).to(dtype)
        query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
        found = plan.attend(layer, query, key, value, kind)
        assert found.shape == (len(lines), heads * HEAD_DIM) and found.dtype == dtype
        flat_keys, flat_values = (t[layer].flatten(0, 1) for t in (cache.keys, cache.values))
        assert torch.equal(flat_keys[tokens.write_index], key)
        assert torch.equal(flat_values[tokens.write_index], value)
        start = 0
        for pages, first, length, prefix in spans:
            held = [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in range(length)]
            q_pos, k_pos = torch.arange(first, length)[:, None], torch.arange(length)[None]
            allowed = k_pos <= q_pos
            allowed |= (q_pos < prefix) & (k_pos < prefix)
            if kind.window:
                allowed &= k_pos > q_pos - kind.window
            queries = query[start : start + length - first]
            want = plain(queries, flat_keys[held], flat_values[held], allowed, kind.cap)
            got = found[start : start + length - first].double()
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            assert float((got - want).abs().max()) < tolerance
            start += length - first
