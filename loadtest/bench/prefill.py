"""Owns the prefill figure: how quickly one long prompt is read, in chunks as a served step has them. Main thread."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from loadtest.comparison import median
from loadtest.peers.degas_peer import DegasSide


def measure(
    model: Path, dtype: torch.dtype, prompt_tokens: int, chunk: int, threads: int, repeats: int
) -> dict[str, Any]:
    """Tokens a second of random prompts, by the wall clock and by CPU time, medians."""
    side = DegasSide(model, dtype, 1, prompt_tokens + 2, prompt_tokens, threads=threads, step_tokens=chunk)
    rng = random.Random(1)

    def draw(count: int) -> list[list[int]]:
        return [[rng.randrange(20, side.model.card.vocab_size) for _ in range(count)]]

    side.run(draw(min(600, prompt_tokens)), 1)
    runs = [side.run(draw(prompt_tokens), 1) for _ in range(repeats)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_tokens": prompt_tokens,
        "chunk": chunk,
        "threads": threads,
        "tokens_per_s": round(median(prompt_tokens / run.seconds for run in runs) or 0, 1),
        "tokens_per_cpu_s": round(median(prompt_tokens / run.cpu_s for run in runs) or 0, 1),
    }


def main(
    model: Annotated[Path, typer.Argument(help="A folder or a GGUF file.")],
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of prompts, comma separated.")] = "512,8000",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a step.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 3,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of activations.")] = "float32",
) -> None:
    """Print one JSON line for each length."""
    for length in prompt_tokens.split(","):
        found = measure(model, getattr(torch, dtype), int(length), chunk, threads, repeats)
        print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
