"""Owns the kernels' cases that are measured on a GPU: each kernel beside its torch reference, at the sizes models use. Main thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.forward import DecodeRows, KVCache, PrefillSegment, StepTokens
from worker.kernels.activation import gelu_tanh, silu_gate
from worker.kernels.experts import experts_product
from worker.kernels.few_rows_product import few_rows_product
from worker.kernels.integer_weight import dequantise, quantise
from worker.kernels.mask import mask_logits
from worker.kernels.norm import layer_norm, rms_norm
from worker.kernels.paged_decode_attention import VARIANTS, paged_decode_attention
from worker.kernels.prefill_attention import make_segments, prefill_attention
from worker.kernels.quantised_linear import quantised_linear
from worker.kernels.rotary_kv_write import rotary_kv_write
from worker.kernels.sample import sample
from worker.kernels.sample_histogram import sample_by_histogram
from worker.models.attention import AttentionPlan
from worker.models.experts import choose, gated
from worker.models.linear import product_gelu
from worker.models.torch_attention import TorchRows
from worker.step.sampler import apply_mask, stochastic

Work = Callable[[], Tensor]
PAGE_TOKENS = 16


@dataclass(slots=True)
class Case:
    """One kernel at one size: ways to run it (one a buffer set), the reference likewise, and its floor."""

    name: str
    kernel: list[Work]
    reference: list[Work]
    num_bytes: int
    flops: float = 0.0
    exact: bool = False  # results are ids: equal or not


class Bench:
    """Sizes, device and dtype shared by all cases; `sets` copies of a case's buffers exceed the L2."""

    def __init__(self, device: torch.device, *, smoke: bool) -> None:
        self.device = device
        self.smoke = smoke
        self.dtype = torch.float32 if smoke else torch.bfloat16
        self.replays = 2 if smoke else 60
        self.cache_bytes = 0 if smoke else 200 << 20

    def sets(self, num_bytes: int) -> int:
        """How many buffer sets a case of this size needs."""
        return max(1, min(64, -(-self.cache_bytes // max(1, num_bytes))))

    def randn(self, *shape: int) -> Tensor:
        """Random values in the bench's dtype."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def time_s(self, runs: list[Work]) -> float:
        """Median seconds of one run: graph replays of all sets in a row, divided by their number."""
        if self.device.type != "cuda":
            started_s = time.perf_counter()
            for run in runs:
                run()
            return (time.perf_counter() - started_s) / len(runs)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for run in runs * 2:
                run()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        times = max(1, 16 // len(runs))  # enough work in a replay to hide its launch
        with torch.cuda.graph(graph, stream=side):
            for run in runs * times:
                run()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.replays + 1)]
        with torch.cuda.stream(side):
            for _ in range(5):
                graph.replay()
            for mark in marks:
                mark.record()
                graph.replay()
        side.synchronize()
        gaps: list[float] = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
        return statistics.median(gaps) / (len(runs) * times)

    # ------------------------------------------------------------------ cases

    def decode(
        self, rows: int, heads: int, kv_heads: int, head_dim: int, context: int, variant: str = "served"
    ) -> Case:
        """One layer's decode attention in a variant, or "served", or that "joined" by the last program, or any variant so
        ("joined" behind its name); the reference is the torch path of the models."""
        arrivals: Tensor | None = None
        if variant.endswith("joined"):
            arrivals = torch.zeros(rows * kv_heads, dtype=torch.int32, device=self.device)
        num_pages = -(-context // PAGE_TOKENS)
        laid = VARIANTS.get(variant.removesuffix(", joined"))
        if laid is not None and heads != kv_heads:
            laid = replace(laid, most_registers=None)  # with grouped heads a bound would make it spill
        kv_bytes = 2 * rows * context * kv_heads * head_dim * self.dtype.itemsize
        kernels: list[Work] = []
        references: list[Work] = []
        for _ in range(self.sets(kv_bytes)):
            shape = (rows * num_pages + 1, PAGE_TOKENS, kv_heads, head_dim)
            keys, values, query = self.randn(*shape), self.randn(*shape), self.randn(rows, heads, head_dim)
            order = torch.randperm(rows * num_pages, device=self.device).to(torch.int32) + 1
            tables = order.view(rows, num_pages)
            lengths = torch.full((rows,), context, dtype=torch.int32, device=self.device)
            kernels.append(
                lambda q=query, k=keys, v=values, t=tables, n=lengths: paged_decode_attention(  # type: ignore[misc]
                    q, k, v, t, n, 2048, variant=laid, arrivals=arrivals
                )
            )
            plain = TorchRows(
                DecodeRows(rows, tables, lengths, context),
                [],
                lengths.long(),
                KVCache([keys], [values], PAGE_TOKENS),
                None,
            )
            references.append(
                lambda p=plain, q=query, k=keys, v=values: p._attend_decode(q, k, v, 0.0)  # type: ignore[misc]
            )
        name = f"decode attention {rows}×{heads}/{kv_heads}×{head_dim}, {context}, {variant}"
        return Case(name, kernels, references, kv_bytes)

    def prefill(
        self, heads: int, kv_heads: int, head_dim: int, tokens: int, context: int, prefix: int
    ) -> Case:
        """One chunk's attention; the reference is SDPA over gathered keys."""
        num_pages = -(-(tokens + context) // PAGE_TOKENS)
        shape = (num_pages + 1, PAGE_TOKENS, kv_heads, head_dim)
        keys, values, query = self.randn(*shape), self.randn(*shape), self.randn(tokens, heads, head_dim)
        table = torch.randperm(num_pages, device=self.device).to(torch.int32) + 1
        segments = make_segments([(0, tokens, context, prefix)], [table])
        out = torch.empty(tokens, heads * head_dim, dtype=self.dtype, device=self.device)
        at = torch.arange(context, context + tokens, device=self.device)
        lines = table.long()[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS
        step = StepTokens(at, lines, None, [PrefillSegment(tokens, context, prefix, table)])
        plan = AttentionPlan(step, KVCache([keys], [values], PAGE_TOKENS))
        new_keys, new_values = keys.flatten(0, 1)[lines], values.flatten(0, 1)[lines]
        seen = sum(
            max(prefix, position + 1) if position < prefix else position + 1 for position in at.tolist()
        )
        num_bytes = (2 * query.numel() + 2 * (tokens + context) * kv_heads * head_dim) * self.dtype.itemsize
        return Case(
            f"prefill attention {tokens}+{context}, prefix {prefix}, {heads}/{kv_heads}×{head_dim}",
            [lambda: prefill_attention(query, keys, values, segments, out)],
            [lambda: plan.attend(0, query, new_keys, new_values)],
            num_bytes,
            flops=4.0 * seen * heads * head_dim,
        )

    def rotary(self, rows: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int) -> Case:
        """Rotation and KV write of one layer; the reference is the torch path of the models."""
        width = heads + 2 * kv_heads
        keys, values = (self.randn(rows // PAGE_TOKENS + 2, PAGE_TOKENS, kv_heads, head_dim) for _ in "kv")
        qkv = self.randn(rows, width * head_dim)
        rotation = torch.randn(rows, rotary_dim // 2, 2, device=self.device)
        turn = torch.view_as_complex(rotation).unsqueeze(1)
        lines = torch.arange(rows, device=self.device)

        def reference() -> Tensor:
            split = qkv.float().nan_to_num_(0.0, 0.0, 0.0).view(rows, width, head_dim)
            pairs = split[:, : heads + kv_heads, :rotary_dim].unflatten(-1, (-1, 2))
            torch.view_as_complex(pairs).mul_(turn)
            cast = split.to(self.dtype)
            keys.flatten(0, 1).index_copy_(0, lines, cast[:, heads : heads + kv_heads])
            values.flatten(0, 1).index_copy_(0, lines, cast[:, heads + kv_heads :])
            return cast[:, :heads]

        return Case(
            f"rotary and KV write {rows}×{heads}/{kv_heads}×{head_dim}",
            [lambda: rotary_kv_write(qkv, rotation, lines, keys, values, heads)],
            [reference],
            2 * qkv.nbytes + rotation.nbytes,
        )

    def norm(self, rows: int, dim: int, *, centred: bool) -> Case:
        """A norm with its residual sum."""
        x, residual, weight, bias = (
            self.randn(rows, dim),
            self.randn(rows, dim),
            self.randn(dim),
            self.randn(dim),
        )

        def kernel() -> Tensor:
            if centred:
                return layer_norm(x, weight, bias, 1e-5, residual)[1]
            return rms_norm(x, weight, 1e-5, residual)[1]

        def reference() -> Tensor:
            if centred:
                return F.layer_norm(x + residual, (dim,), weight, bias, 1e-5)
            return F.rms_norm(x + residual, (dim,), weight, 1e-5)

        kind = "LayerNorm" if centred else "RMSNorm"
        return Case(f"{kind} with sum {rows}×{dim}", [kernel], [reference], 4 * x.nbytes)

    def activation(self, rows: int, dim: int, *, gated: bool) -> Case:
        """An MLP's activation."""
        x = self.randn(rows, 2 * dim if gated else dim)
        if gated:
            return Case(
                f"silu gate {rows}×{dim}",
                [lambda: silu_gate(x)],
                [lambda: F.silu(x[:, :dim]) * x[:, dim:]],
                x.nbytes * 3 // 2,
            )
        return Case(
            f"gelu {rows}×{dim}",
            [lambda: gelu_tanh(x)],
            [lambda: F.gelu(x, approximate="tanh")],
            2 * x.nbytes,
        )

    def gated(self, rows: int, inputs: int, dim: int) -> Case:
        """A gated MLP's first product with its gate, against cuBLAS and the gate's kernel."""
        kernels: list[Work] = []
        references: list[Work] = []
        num_bytes = 2 * dim * inputs * self.dtype.itemsize
        x = self.randn(rows, inputs)
        arrivals = torch.zeros(-(-2 * dim // 16), dtype=torch.int32, device=self.device)
        for _ in range(self.sets(num_bytes)):
            weight = self.randn(2 * dim, inputs) / inputs**0.5
            kernels.append(lambda w=weight: few_rows_product(x, w, arrivals, gate="silu"))  # type: ignore[misc]
            references.append(lambda w=weight: silu_gate(F.linear(x, w)))  # type: ignore[misc]
        return Case(f"product with silu gate {rows}×{inputs}→{dim}", kernels, references, num_bytes)

    def gelu_product(self, rows: int, inputs: int, outputs: int) -> Case:
        """The vision encoder's first product of an MLP with cuBLAS's GELU, against the kernel behind it."""
        x, bias, weight = (
            self.randn(rows, inputs),
            self.randn(outputs),
            self.randn(outputs, inputs) / inputs**0.5,
        )
        return Case(
            f"product with gelu {rows}×{inputs}→{outputs}",
            [lambda: product_gelu(bias, x, weight)],
            [lambda: gelu_tanh(F.linear(x, weight, bias))],
            (rows * (inputs + outputs) + inputs * outputs) * self.dtype.itemsize,
            flops=2.0 * rows * inputs * outputs,
        )

    def sampling(
        self, rows: int, vocab: int, temperature: float, top_k: int, top_p: float, *, by: str = "histogram"
    ) -> Case:
        """Sampling by one of the two kernels against the sorting reference."""
        kernel = sample_by_histogram if by == "histogram" else sample
        # Logits are rounded to bf16, as a bf16 product gives them.
        logits = (torch.randn(rows, vocab, device=self.device) * 3).bfloat16().float()

        def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=self.device)

        given = (full(temperature), full(top_k, torch.int32), full(top_p), full(0.0))
        uniforms = torch.rand(rows, device=self.device)
        return Case(
            f"sample by {by} {rows}×{vocab} t={temperature} k={top_k} p={top_p}",
            [lambda: kernel(logits, *given, uniforms)[0]],
            [lambda: stochastic(logits, *given, uniforms)],
            logits.nbytes,
            exact=True,
        )

    def masking(self, rows: int, vocab: int) -> Case:
        """A bit mask over logits."""
        logits = torch.randn(rows, vocab, device=self.device)
        words = torch.randint(-(2**31), 2**31 - 1, (rows, (vocab + 31) // 32), device=self.device).to(
            torch.int32
        )
        return Case(
            f"mask {rows}×{vocab}",
            [lambda: mask_logits(logits, words)],
            [lambda: apply_mask(logits, words)],
            words.nbytes + logits.nbytes // 2,
        )

    def quantised(self, rows: int, inputs: int, outputs: int, bits: int) -> Case:
        """A weight-only product against the same product in the bench's dtype."""
        kernels: list[Work] = []
        references: list[Work] = []
        num_bytes = inputs * outputs * bits // 8
        x = self.randn(rows, inputs)
        for _ in range(self.sets(num_bytes)):
            weight = quantise(torch.randn(outputs, inputs, device=self.device), bits, 32)
            if bits == 4:  # as Q4_1 has it: an offset beside each scale
                weight = replace(weight, least=-8 * weight.scales)
            plain = dequantise(weight).to(self.dtype)
            num_bytes = weight.num_bytes
            kernels.append(lambda w=weight: quantised_linear(x, w))  # type: ignore[misc]
            references.append(lambda w=plain: F.linear(x, w))  # type: ignore[misc]
        return Case(f"int{bits} product {rows}×{inputs}→{outputs}", kernels, references, num_bytes)

    def routed(self, rows: int, dim: int, inner: int, experts: int, chosen: int) -> Case:
        """Routed experts against products with each row's own copies of the weights it chose; the floor reads each chosen
        expert once."""
        kernels: list[Work] = []
        references: list[Work] = []
        num_bytes = 3 * experts * dim * inner * self.dtype.itemsize
        x = self.randn(rows, dim)
        ids, weights = choose(torch.randn(rows, experts, device=self.device), chosen)
        for _ in range(self.sets(num_bytes)):
            first, second = self.randn(experts, 2 * inner, dim) / dim**0.5, self.randn(experts, dim, inner)
            kernels.append(
                lambda f=first, s=second: experts_product(x, ids, weights, f, s, "gelu_plus_1")  # type: ignore[misc]
            )
            references.append(lambda f=first, s=second: _copied_experts(x, ids, weights, f, s))  # type: ignore[misc]
        read = num_bytes * len(ids.unique()) // experts
        return Case(f"routed experts {rows}×{dim}, {chosen} of {experts}", kernels, references, read)

    def cases(self) -> list[Callable[[], Case]]:
        """Every case, made one at a time: together they would not fit."""
        if self.smoke:
            return [
                lambda: self.decode(2, 4, 2, 16, 40),
                lambda: self.decode(2, 4, 2, 16, 40, "joined"),
                lambda: self.gated(2, 64, 40),
                lambda: self.gelu_product(40, 64, 48),
                lambda: self.prefill(2, 2, 16, 20, 8, 0),
                lambda: self.rotary(2, 2, 2, 16, 8),
                lambda: self.norm(2, 32, centred=True),
                lambda: self.norm(2, 32, centred=False),
                lambda: self.activation(2, 32, gated=False),
                lambda: self.activation(2, 32, gated=True),
                lambda: self.sampling(2, 100, 0.7, 20, 0.9),
                lambda: self.sampling(2, 100, 0.7, 20, 0.9, by="search"),
                lambda: self.masking(2, 100),
                lambda: self.quantised(2, 128, 32, 4),
                lambda: self.routed(3, 32, 32, 4, 2),
            ]
        made: list[Callable[[], Case]] = []
        for heads, kv_heads, head_dim in [(32, 32, 64), (16, 8, 128), (32, 8, 64)]:
            made += [
                lambda r=rows, h=heads, k=kv_heads, d=head_dim: self.decode(r, h, k, d, 850)  # type: ignore[misc]
                for rows in (1, 8, 32, 128)
            ]
            made += [
                lambda r=rows, h=heads, k=kv_heads, d=head_dim, v=name: self.decode(r, h, k, d, 850, v)  # type: ignore[misc]
                for rows in (1, 8, 32)
                for name in (*VARIANTS, "joined", "2 warps, joined")
                if heads == kv_heads or name in ("bound, staged", "2 warps", "joined")
            ]
            made.append(lambda h=heads, k=kv_heads, d=head_dim: self.prefill(h, k, d, 1024, 0, 0))  # type: ignore[misc]
        made += [
            lambda: self.prefill(32, 32, 64, 745, 0, 730),
            lambda: self.prefill(32, 32, 64, 32, 730, 730),
            lambda: self.rotary(1, 32, 32, 64, 32),
            lambda: self.rotary(32, 32, 32, 64, 32),
            lambda: self.rotary(1024, 32, 32, 64, 32),
        ]
        for rows in (1, 32, 1024):
            made.append(lambda r=rows: self.norm(r, 2048, centred=True))  # type: ignore[misc]
            made.append(lambda r=rows: self.norm(r, 2048, centred=False))  # type: ignore[misc]
            made.append(lambda r=rows: self.activation(r, 8192, gated=False))  # type: ignore[misc]
            made.append(lambda r=rows: self.activation(r, 8192, gated=True))  # type: ignore[misc]
        for rows, vocab in [(1, 51200), (32, 51200), (32, 151936)]:
            for temperature, top_k, top_p in [(0.0, 0, 1.0), (0.5, 0, 0.3), (1.0, 0, 1.0), (0.7, 20, 0.8)]:
                for by in ("histogram", "search"):
                    made.append(
                        lambda r=rows, v=vocab, t=temperature, k=top_k, p=top_p, b=by: self.sampling(  # type: ignore[misc]
                            r, v, t, k, p, by=b
                        )
                    )
        made += [lambda r=rows: self.gated(r, 1024, 3072) for rows in (1, 8, 32)]  # type: ignore[misc]
        made.append(lambda: self.gelu_product(9 * 729, 1152, 4304))
        made.append(lambda: self.masking(32, 151936))
        made += [lambda r=rows: self.routed(r, 2048, 1024, 64, 8) for rows in (1, 4, 8, 32)]  # type: ignore[misc]
        for rows in (1, 8, 16, 32, 64):
            for bits in (8, 4):
                made.append(lambda r=rows, b=bits: self.quantised(r, 2048, 8192, b))  # type: ignore[misc]
        return made


def _copied_experts(x: Tensor, ids: Tensor, weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What `experts_product` computes, by batched products over copies: (N, D)."""
    rows, chosen = ids.shape
    repeated = x.repeat_interleave(chosen, 0).unsqueeze(2)
    inner = gated(torch.bmm(first[ids.flatten()], repeated).squeeze(2))
    parts = torch.bmm(second[ids.flatten()], inner.unsqueeze(2)).view(rows, chosen, -1).float()
    return (parts * weights.unsqueeze(2)).sum(1).to(x.dtype)
