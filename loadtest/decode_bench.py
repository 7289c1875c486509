"""Owns the decode comparison: the real engine and runner beside transformers' `generate`, same weights. Main thread.

Both run in this process on one compute thread, turn about, on a random Llama-shaped checkpoint that both load from
the same files. Rates count decoding only: tokens after each row's first, over the time since the last row's first.
Only the ratios of neighbouring runs mean anything on a shared machine; `measure` returns their median. Beside the
wall clock stands the thread's own CPU time, which other processes disturb far less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from shared.protocol import FromWorker, StepOutputs, Submit, pack_i32, unpack_i32, unpack_i64
from worker.device.cpu import CpuDevice
from worker.device.huge_pages import use_huge_pages
from worker.engine import Command, Engine
from worker.models.registry import load_model
from worker.pages import PagePool
from worker.prefix_cache import PrefixCache
from worker.scheduler import Scheduler, SchedulerLimits
from worker.torch_runner import TorchRunner

GATEWAY, EPOCH = b"bench", 1


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a random Llama checkpoint; embeddings are tied."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int = 64


SHAPES = {
    # 29.1M parameters: 12 layers of 2.16M and 3.1M embeddings, 58 MB in bf16.
    "30m": Shape(384, 1536, 12, 6, 2, 8192),
    # The sizes of Qwen2.5-0.5B: 494M parameters, 988 MB in bf16.
    "0.5b": Shape(896, 4864, 24, 14, 2, 151936),
}
CONTEXT_TOKENS, PAGE_TOKENS = 2048, 16


@dataclass(slots=True)
class Run:
    """One run's rates by the wall clock and by this thread's CPU time, and the tokens of each row."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    tokens: list[list[int]]


Stamp = tuple[float, float]
"""Wall-clock seconds, and CPU seconds of this thread."""


def read_clocks() -> Stamp:
    """Now, by both clocks."""
    return time.perf_counter(), time.thread_time()


def rate(num_tokens: int, start: Stamp, end: Stamp) -> tuple[float, float]:
    """Tokens a second by both clocks."""
    return num_tokens / (end[0] - start[0]), num_tokens / (end[1] - start[1])


class TokenLog:
    """Stands in for the I/O thread: keeps every step's message, and when it was handed over."""

    def __init__(self) -> None:
        self.steps: list[tuple[Stamp, StepOutputs]] = []

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        """For one gateway. Raises RuntimeError on anything but tokens."""
        if not isinstance(message, StepOutputs):
            raise RuntimeError(f"the engine refused a row: {message}")
        self.steps.append((read_clocks(), message))

    def broadcast(self, message: FromWorker) -> None:
        """Heartbeats are of no interest here."""


class DegasSide:
    """The engine over a TorchRunner, ticked by the caller as the decode thread would."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, rows: int, row_tokens: int, prompt_tokens: int, depth: int
    ) -> None:
        device = CpuDevice(num_threads=1)
        with torch.inference_mode():
            self.model = load_model(folder, device.torch_device, dtype, lambda *_: None)
        use_huge_pages()
        num_pages = rows * -(-row_tokens // PAGE_TOKENS) + 2 * rows + 1
        pool = PagePool(num_pages, PAGE_TOKENS)
        step_tokens = rows * prompt_tokens + rows
        limits = SchedulerLimits(
            max_rows=rows,
            step_tokens=step_tokens,
            mixed_tokens=step_tokens,
            max_sequence_tokens=CONTEXT_TOKENS,
        )
        with torch.inference_mode():
            runner = TorchRunner(
                self.model,
                device,
                num_slots=max(2, depth),
                num_pages=num_pages,
                page_tokens=PAGE_TOKENS,
                max_rows=rows,
                max_sequence_tokens=CONTEXT_TOKENS,
                step_tokens=step_tokens,
            )
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._log = TokenLog()
        self.engine = Engine(
            Scheduler(limits, pool, PrefixCache(pool)),
            runner,
            self.model.card,
            inbox=self._inbox,
            outbox=self._log,
            clock=time.perf_counter,
            epoch=EPOCH,
            depth=depth,
        )
        self._next_id = 0

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Decode `new_tokens` for every prompt, greedily."""
        first_id = self._next_id
        self._log.steps.clear()
        for prompt in prompts:
            submit = Submit(
                EPOCH,
                self._next_id,
                str(self._next_id),
                pack_i32(prompt),
                new_tokens,
                ignore_eos=True,
            )
            self._inbox.put((GATEWAY, submit, []))
            self._next_id += 1
        while self.engine.tick():
            pass
        tokens: list[list[int]] = [[] for _ in prompts]
        started = (0.0, 0.0)
        for at, step in self._log.steps:
            for sequence_id, token_id in zip(
                unpack_i64(step.sequence_ids), unpack_i32(step.token_ids), strict=True
            ):
                row = tokens[sequence_id - first_id]
                if not row:
                    started = at
                row.append(token_id)
        return Run(*rate(len(prompts) * (new_tokens - 1), started, self._log.steps[-1][0]), tokens)


class TransformersSide:
    """transformers' `generate`: batched, greedy, with the cache that is the quicker here."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None  # `min_new_tokens` would forbid it, at a cost
        self.cache = "dynamic"

    def choose_cache(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Try both caches, each twice (the first run warms up), and keep the quicker."""
        rates = {}
        for cache in ("dynamic", "static"):
            self.cache = cache
            self.run(prompts, min(8, new_tokens))
            rates[cache] = self.run(prompts, new_tokens).tokens_per_cpu_s
        self.cache = max(rates, key=lambda cache: rates[cache])

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Decode `new_tokens` for every prompt, greedily."""
        ids = torch.tensor(prompts)
        stamps: list[Stamp] = []

        def stamp(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            """A stopping criterion that never stops: called after each step."""
            stamps.append(read_clocks())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                use_cache=True,
                cache_implementation=None if self.cache == "dynamic" else self.cache,
                disable_compile=True,
                stopping_criteria=[stamp],
            )
        tokens = out[:, ids.shape[1] :].tolist()
        return Run(*rate(len(prompts) * (new_tokens - 1), stamps[0], stamps[-1]), tokens)


def write_checkpoint(folder: Path, shape: Shape, dtype: torch.dtype) -> int:
    """Write a random checkpoint of this shape; returns its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **asdict(shape), max_position_embeddings=CONTEXT_TOKENS, tie_word_embeddings=True, bos_token_id=1
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def measure(
    rows: int,
    new_tokens: int = 64,
    prompt_tokens: int = 32,
    repeats: int = 5,
    shape: str = "30m",
    *,
    dtype: torch.dtype = torch.bfloat16,
    depth: int = 2,
) -> dict[str, Any]:
    """Decode rates of both sides at `rows` rows, run turn about `repeats` times; medians, and every run."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    vocab_size = SHAPES[shape].vocab_size

    def draw() -> list[list[int]]:
        ids: list[list[int]] = torch.randint(
            4, vocab_size, (rows, prompt_tokens), generator=generator
        ).tolist()
        return ids

    with tempfile.TemporaryDirectory(prefix="degas-bench-") as name:
        folder = Path(name)
        num_parameters = write_checkpoint(folder, SHAPES[shape], dtype)
        ours = DegasSide(folder, dtype, rows, prompt_tokens + new_tokens, prompt_tokens, depth)
        theirs = TransformersSide(folder, dtype)
    warm = draw()
    ours.run(warm, new_tokens)
    theirs.choose_cache(warm, new_tokens)
    pairs: list[tuple[Run, Run]] = []
    same = []
    for _ in range(repeats):
        prompts = draw()
        a, b = ours.run(prompts, new_tokens), theirs.run(prompts, new_tokens)
        pairs.append((a, b))
        both = [pair for x, y in zip(a.tokens, b.tokens, strict=True) for pair in zip(x, y, strict=True)]
        same.append(sum(x == y for x, y in both) / len(both))
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in pairs]
    cpu_ratios = [a.tokens_per_cpu_s / b.tokens_per_cpu_s for a, b in pairs]
    return {
        "shape": shape,
        "parameters": num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "degas_tokens_per_s": statistics.median(a.tokens_per_s for a, _ in pairs),
        "transformers_tokens_per_s": statistics.median(b.tokens_per_s for _, b in pairs),
        "degas_tokens_per_cpu_s": statistics.median(a.tokens_per_cpu_s for a, _ in pairs),
        "transformers_tokens_per_cpu_s": statistics.median(b.tokens_per_cpu_s for _, b in pairs),
        "transformers_cache": theirs.cache,
        "ratio": statistics.median(ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "same_tokens": statistics.median(same),
    }


def main() -> None:
    """Print one JSON line for each number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="30m")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--depth", type=int, default=2)
    chosen = parser.parse_args()
    for rows in chosen.rows.split(","):
        found = measure(
            int(rows),
            chosen.new_tokens,
            chosen.prompt_tokens,
            chosen.repeats,
            chosen.shape,
            dtype=getattr(torch, chosen.dtype),
            depth=chosen.depth,
        )
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}))


if __name__ == "__main__":
    main()
