"""Compiled kernels against fp64 on the GPU, at true sizes, over poisoned outputs and memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.step.sampler import apply_mask, stochastic

NAN = float("nan")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN passes no comparison."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def plain(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None) -> Tensor:
    """(S, H, D) over (L, KH, D) → (S, H·D), in fp64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("shd,lhd->hsl", query.double(), keys) / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("hsl,lhd->shd", scores.softmax(-1), values).flatten(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 64), (16, 8, 128), (32, 8, 64)])
@pytest.mark.parametrize("num_splits", [None, 1, 8])
def test_decode(
    heads: int, kv_heads: int, head_dim: int, num_splits: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    from worker.kernels.paged_decode_attention import paged_decode_attention

    lengths = [1, 15, 16, 17, 64, 850, 2048, 1]
    width = 2048 // 16
    keys = torch.full((len(lengths) * width + 1, 16, kv_heads, head_dim), NAN, dtype=dtype, device=device)
    values = torch.full_like(keys, NAN)
    tables = torch.zeros(len(lengths), width, dtype=torch.int32, device=device)
    order = torch.randperm(len(lengths) * width, device=device) + 1
    query = torch.randn(len(lengths), heads, head_dim, device=device).to(dtype)
    expected = []
    for row, length in enumerate(lengths):
        pages = order[row * width : row * width + -(-length // 16)]
        tables[row, : len(pages)] = pages
        at = torch.arange(length, device=device)
        lines = pages[at // 16] * 16 + at % 16
        for memory in (keys, values):
            memory.flatten(0, 1)[lines] = torch.randn(length, kv_heads, head_dim, device=device).to(dtype)
        expected.append(plain(query[row : row + 1], keys.flatten(0, 1)[lines], values.flatten(0, 1)[lines]))
    out = torch.full((len(lengths), heads * head_dim), NAN, dtype=dtype, device=device)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    paged_decode_attention(query, keys, values, tables, counts, 2048, out=out, num_splits=num_splits)
    for row, want in enumerate(expected):
        assert error(out[row : row + 1], want) < LIMIT[dtype], lengths[row]


def test_every_variant_of_decode_attention_computes_the_same(device: torch.device) -> None:
    from worker.kernels.paged_decode_attention import VARIANTS, paged_decode_attention

    rows, width = 8, 64
    keys, values = (torch.randn(rows * width + 1, 16, 32, 64, device=device).bfloat16() for _ in "kv")
    query = torch.randn(rows, 32, 64, device=device).bfloat16()
    tables = (torch.randperm(rows * width, device=device).to(torch.int32) + 1).view(rows, width)
    lengths = torch.tensor([1, 15, 64, 65, 850, 1000, 1024, 1], dtype=torch.int32, device=device)
    found = {
        name: paged_decode_attention(
            query, keys, values, tables, lengths, 1024, num_splits=8, variant=variant
        )
        for name, variant in VARIANTS.items()
    }
    for name, out in found.items():
        assert error(out, found["plain"]) < 5e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 64), (16, 8, 128)])
def test_prefill(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    from worker.kernels.prefill_attention import Segments, make_segments, prefill_attention

    chunks = [(745, 0, 730), (32, 730, 730), (1, 99, 0), (129, 500, 0)]
    keys = torch.full((200, 16, kv_heads, head_dim), NAN, dtype=dtype, device=device)
    values = torch.full_like(keys, NAN)
    flat, at_page, spans, tables, expected = 3, 1, [], [], []
    query = torch.randn(3 + sum(c[0] for c in chunks), heads, head_dim, device=device).to(dtype)
    for num, context, prefix in chunks:
        length = num + context
        table = torch.arange(at_page, at_page + -(-length // 16), device=device, dtype=torch.int32).flip(0)
        at_page += len(table)
        at = torch.arange(length, device=device)
        lines = table.long()[at // 16] * 16 + at % 16
        for memory in (keys, values):
            memory.flatten(0, 1)[lines] = torch.randn(length, kv_heads, head_dim, device=device).to(dtype)
        row = torch.arange(context, length, device=device)[:, None]
        seen = (at <= row) | ((at < prefix) & (row < prefix))
        expected.append(
            plain(query[flat : flat + num], keys.flatten(0, 1)[lines], values.flatten(0, 1)[lines], seen)
        )
        spans.append((flat, num, context, prefix))
        tables.append(table)
        flat += num
    out = torch.full((flat, heads * head_dim), NAN, dtype=dtype, device=device)
    segments = make_segments(spans, tables)
    prefill_attention(query, keys, values, segments, out)
    assert out[:3].isnan().all()
    empty = torch.zeros(20, segments.spans.shape[1], dtype=torch.int32, device=device)
    padded = torch.full_like(out, NAN)
    prefill_attention(
        query, keys, values, Segments(torch.cat([segments.spans, empty]), segments.tables), padded
    )
    assert padded[:3].isnan().all() and torch.equal(padded[3:], out[3:]), "empty spans change nothing"
    for (start, num, *_), want in zip(spans, expected, strict=True):
        assert error(out[start : start + num], want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 33, 1024])
def test_norms_and_activations(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    from worker.kernels.activation import gelu_tanh, silu_gate
    from worker.kernels.norm import layer_norm, rms_norm

    x, residual = (torch.randn(rows, 2048, device=device).to(dtype) for _ in "ab")
    weight, bias = (torch.randn(2048, device=device).to(dtype) for _ in "ab")
    total, found = layer_norm(x, weight, bias, 1e-5, residual)
    torch.testing.assert_close(total, x + residual)
    exact, w = total.double(), weight.double()
    assert error(found, F.layer_norm(exact, (2048,), w, bias.double(), 1e-5)) < LIMIT[dtype]
    assert error(rms_norm(x, weight, 1e-6)[1], F.rms_norm(x.double(), (2048,), w, 1e-6)) < LIMIT[dtype]
    assert error(gelu_tanh(x), F.gelu(x.double(), approximate="tanh")) < LIMIT[dtype]
    gate, up = x.double().chunk(2, dim=1)
    assert error(silu_gate(x), F.silu(gate) * up) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary"), [(32, 32, 64, 32), (16, 8, 128, 128)])
def test_rotary_kv_write(
    heads: int, kv_heads: int, head_dim: int, rotary: int, dtype: torch.dtype, device: torch.device
) -> None:
    from worker.kernels.rotary_kv_write import rotary_kv_write

    rows, width = 37, heads + 2 * kv_heads
    qkv = torch.randn(rows, width * head_dim, device=device).to(dtype)
    qkv[3, 0], qkv[4, -1] = NAN, float("inf")
    angles = torch.rand(rows, rotary // 2, device=device) * 6
    rotation = torch.stack([angles.cos(), angles.sin()], -1)
    keys = torch.full((8, 16, kv_heads, head_dim), NAN, dtype=dtype, device=device)
    values = torch.full_like(keys, NAN)
    lines = torch.randperm(8 * 16, device=device)[:rows]
    query = rotary_kv_write(qkv, rotation, lines, keys, values, heads)
    x = qkv.double().nan_to_num(0.0, 0.0, 0.0).view(rows, width, head_dim)
    a, b = x[..., :rotary:2], x[..., 1:rotary:2]
    cos, sin = (part[:, None].double() for part in (angles.cos(), angles.sin()))
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    y = torch.cat([turned, x[..., rotary:]], -1)
    assert error(query, y[:, :heads]) < LIMIT[dtype]
    assert error(keys.flatten(0, 1)[lines], y[:, heads : heads + kv_heads]) < LIMIT[dtype]
    assert error(values.flatten(0, 1)[lines], x[:, heads + kv_heads :]) < LIMIT[dtype]
    assert int(keys.flatten(0, 1).isfinite().all(-1).all(-1).sum()) == rows


@pytest.mark.parametrize("vocab", [51200, 151936])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("by", ["histogram", "search"])
def test_sampling_equals_the_sorting_sampler(vocab: int, coarse: bool, by: str, device: torch.device) -> None:
    from worker.kernels.sample import sample as by_search
    from worker.kernels.sample_histogram import sample_by_histogram

    sample = sample_by_histogram if by == "histogram" else by_search
    rows = 64
    logits = torch.randn(rows, vocab, device=device) * 4
    if coarse:
        logits = logits.bfloat16().float()
    logits[5, 77] = NAN
    words = torch.randint(-(2**31), 2**31 - 1, (rows, (vocab + 31) // 32), device=device).to(torch.int32)
    pick = torch.arange(rows, device=device) % 5
    temperature = torch.tensor([0.0, 1.0, 0.5, 0.7, 2.0], device=device)[pick]
    top_k = torch.tensor([0, 0, 0, 20, 500], device=device, dtype=torch.int32)[pick]
    top_p = torch.tensor([1.0, 1.0, 0.3, 0.8, 0.95], device=device)[pick]
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05], device=device)[pick]
    uniforms = torch.rand(rows, device=device)
    given = (temperature, top_k, top_p, min_p, uniforms)
    ids, bad = sample(logits, *given, words=words)
    expected = stochastic(apply_mask(logits, words), *given)
    assert bad.nonzero().flatten().tolist() == [5]
    good = torch.arange(rows, device=device) != 5
    # Sums over a vocabulary round differently, so a draw near an edge may fall on the neighbour.
    same = (ids == expected)[good].double().mean()
    assert float(same) >= 0.95
    assert bool((ids == expected)[good & (temperature == 0)].all())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_product(bits: int, device: torch.device) -> None:
    from worker.kernels.integer_weight import dequantise, quantise
    from worker.kernels.quantised_linear import quantised_linear

    weight = quantise(torch.randn(8192, 2048, device=device), bits, 32)
    if bits == 4:  # with an offset, as Q4_1 has it
        weight = replace(weight, least=weight.scales * -7.5)
    for rows in (1, 7, 16, 33, 64, 200):
        x = torch.randn(rows, 2048, device=device).bfloat16()
        assert error(quantised_linear(x, weight), x.double() @ dequantise(weight).double().t()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("inputs", "outputs", "gate"),
    [(2048, 14336, None), (10240, 2048, None), (1024, 6144, "silu"), (3072, 1024, None), (300, 130, "gelu")],
)
def test_products_of_few_rows(
    inputs: int, outputs: int, gate: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Against fp64; a row has the same bits in any batch and in any run, whichever program arrives last."""
    from worker.kernels.few_rows_product import few_rows_product

    x, weight = torch.randn(32, inputs, device=device).to(dtype), torch.randn(outputs, inputs, device=device)
    weight = (weight / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype)
    arrivals = torch.zeros(-(-outputs // 16), dtype=torch.int32, device=device)
    exact = x.double() @ weight.double().t() + bias.double()
    if gate is not None:
        first, second = exact.chunk(2, 1)
        exact = (F.silu(first) if gate == "silu" else F.gelu(first, approximate="tanh")) * second
    found = few_rows_product(x, weight, arrivals, bias, gate=gate)
    assert error(found, exact) < LIMIT[dtype]
    for rows in (1, 2, 7, 8, 16, 31, 32) * 20:
        assert torch.equal(few_rows_product(x[:rows], weight, arrivals, bias, gate=gate), found[:rows]), rows
    assert not arrivals.any()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 64), (16, 8, 128), (32, 8, 64)])
def test_the_last_program_of_a_head_joins(
    heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> None:
    from worker.kernels.paged_decode_attention import paged_decode_attention

    rows, width = 4, 64
    keys, values = (
        torch.randn(rows * width + 1, 16, kv_heads, head_dim, device=device).bfloat16() for _ in "kv"
    )
    query = torch.randn(rows, heads, head_dim, device=device).bfloat16()
    tables = (torch.randperm(rows * width, device=device).to(torch.int32) + 1).view(rows, width)
    lengths = torch.tensor([1, 64, 850, 1024], dtype=torch.int32, device=device)
    given = (query, keys, values, tables, lengths, 1024)
    expected = paged_decode_attention(*given, num_splits=8)
    arrivals = torch.zeros(rows * kv_heads, dtype=torch.int32, device=device)
    found = paged_decode_attention(*given, num_splits=8, arrivals=arrivals)
    assert error(found, expected) < 5e-3
    for _ in range(100):
        assert torch.equal(paged_decode_attention(*given, num_splits=8, arrivals=arrivals), found)
    assert not arrivals.any()


def test_dependent_launches_change_no_bit(device: torch.device) -> None:
    """A chain of kernels that read each other's outputs, eagerly and in a graph, over memory that is reused."""
    from worker.device.choices import flipped
    from worker.kernels.activation import silu_gate
    from worker.kernels.few_rows_product import few_rows_product
    from worker.kernels.norm import rms_norm

    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("dependent launches begin with Hopper")
    weights = [torch.randn(2048, 1024, device=device).div_(32).bfloat16() for _ in range(24)]
    norms = [torch.rand(1024, device=device).bfloat16() for _ in weights]
    arrivals = torch.zeros(128, dtype=torch.int32, device=device)
    start = torch.randn(4, 1024, device=device).bfloat16()

    def chain() -> Tensor:
        hidden, gained = start, start
        for weight, scale in zip(weights, norms, strict=True):
            hidden, normed = rms_norm(hidden, scale, 1e-6, gained)
            gained = silu_gate(few_rows_product(normed, weight, arrivals))
        return hidden + gained

    expected = chain()
    with flipped("dependent_launch"):
        for _ in range(20):
            assert torch.equal(chain(), expected)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            found = chain()
    for _ in range(20):
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 8, 32, 900])
def test_routed_experts_at_moondreams_size(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """From the router's logits to the sum; with more rows than experts have room for in a tile, too."""
    from worker.kernels.experts import experts_product
    from worker.kernels.routing import choose_experts

    experts, chosen, dim, inner = 64, 8, 2048, 1024
    x = torch.randn(rows, dim, device=device).to(dtype)
    first = (torch.randn(experts, 2 * inner, dim, device=device) / dim**0.5).to(dtype)
    second = (torch.randn(experts, dim, inner, device=device) / inner**0.5).to(dtype)
    logits = torch.randn(rows, experts, device=device)
    ids, weights = choose_experts(logits, chosen)
    best = logits.topk(chosen)
    assert torch.equal(ids.long(), best.indices)
    torch.testing.assert_close(weights, best.values.softmax(-1))
    expected = torch.zeros(rows, dim, dtype=torch.float64, device=device)
    for expert in range(experts):
        at, place = (ids == expert).nonzero(as_tuple=True)
        h, g = (x[at].double() @ first[expert].double().t()).chunk(2, dim=-1)
        part = (F.gelu(h) * (g + 1)) @ second[expert].double().t()
        expected.index_add_(0, at, part * weights[at, place].double().unsqueeze(1))
    found = experts_product(x, ids, weights, first, second, "gelu_plus_1")
    assert error(found, expected) < LIMIT[dtype]
    alone = experts_product(x[:1], ids[:1], weights[:1], first, second, "gelu_plus_1")
    assert error(alone, expected[:1]) < LIMIT[dtype]


def test_heads_are_scaled_by_content_and_position(device: torch.device) -> None:
    from worker.kernels.head_scale import scale_heads

    rows, heads, dim = 33, 32, 64
    qkv = torch.randn(rows, 3 * heads * dim, device=device)
    content, alpha = torch.randn(rows, 2 * heads, device=device) * 3, torch.randn(heads, device=device)
    logs = torch.arange(1, rows + 1, device=device).float().log().unsqueeze(1)
    expected = qkv.clone().view(rows, 3, heads, dim)
    position = 0.5 + torch.sigmoid(alpha * logs)
    for part, place in ((0, 0), (2, heads)):
        expected[:, part] *= (content[:, place : place + heads].tanh() + position).unsqueeze(-1)
    scale_heads(qkv, content, alpha, logs, heads)
    assert error(qkv, expected.view(rows, -1)) < 1e-6
