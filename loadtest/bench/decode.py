"""Owns the quick decode comparison: Degas's engine beside transformers' `generate` in one process. Main thread.

Both take turns with the same random weights on one compute thread. Rates count tokens after each row's first, over
the time since the last row's first token, by the wall clock and by CPU time.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from loadtest.comparison import median, median_ratio, rounded, same_share
from loadtest.peers.catalog import SHAPES
from loadtest.peers.checkpoint import random_prompts, vocab_size, write_checkpoint
from loadtest.peers.degas_peer import DegasSide
from loadtest.peers.side import Run
from loadtest.peers.transformers_peer import TransformersSide

OURS, THEIRS = "degas", "transformers"


def decode_figures(rounds: list[dict[str, Run]]) -> dict[str, float | None]:
    """Decode rates of both sides in tokens a second, medians, and the medians of their ratios."""

    def rate(run: Run) -> float | None:
        return run.decode_tokens_per_s

    def cpu_rate(run: Run) -> float | None:
        return run.decode_tokens_per_cpu_s

    return {
        "degas_tokens_per_s": median(rate(one[OURS]) for one in rounds),
        "transformers_tokens_per_s": median(rate(one[THEIRS]) for one in rounds),
        "degas_tokens_per_cpu_s": median(cpu_rate(one[OURS]) for one in rounds),
        "transformers_tokens_per_cpu_s": median(cpu_rate(one[THEIRS]) for one in rounds),
        "ratio": median_ratio(rounds, OURS, THEIRS, rate),
        "cpu_ratio": median_ratio(rounds, OURS, THEIRS, cpu_rate),
    }


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
    """Decode rates of both sides at `rows` rows, run turn about `repeats` times; medians, and every ratio."""
    torch.set_num_threads(1)
    rng = random.Random(1)

    def draw() -> list[list[int]]:
        return random_prompts(rng, rows, prompt_tokens, vocab_size(shape))

    with tempfile.TemporaryDirectory(prefix="degas-bench-") as name:
        folder = Path(name)
        num_parameters = write_checkpoint(folder, shape, dtype)
        ours = DegasSide(folder, dtype, rows, prompt_tokens + new_tokens, prompt_tokens, depth)
        theirs = TransformersSide(folder, dtype)
    warm = draw()
    ours.warm(warm, new_tokens)
    theirs.warm(warm, new_tokens)
    rounds: list[dict[str, Run]] = []
    for _ in range(repeats):
        prompts = draw()
        rounds.append({OURS: ours.run(prompts, new_tokens), THEIRS: theirs.run(prompts, new_tokens)})
    ratios = [median_ratio([one], OURS, THEIRS, lambda run: run.decode_tokens_per_s) or 0.0 for one in rounds]
    return {
        "shape": shape,
        "parameters": num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        **decode_figures(rounds),
        "transformers_cache": theirs.cache,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "same_tokens": median(same_share(one[OURS].tokens, one[THEIRS].tokens) for one in rounds),
    }


def main(
    rows: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,8,32",
    new_tokens: Annotated[int, typer.Option(help="Tokens each row decodes.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens in.")] = 32,
    repeats: Annotated[int, typer.Option(help="Turns each side gets.")] = 5,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(sorted(SHAPES))}.")] = "30m",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of both sides.")] = "bfloat16",
    depth: Annotated[int, typer.Option(help="Steps in flight.")] = 2,
) -> None:
    """Print one JSON line for each number of rows."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(sorted(SHAPES))}", param_hint="--shape")
    for number in rows.split(","):
        found = measure(
            int(number),
            new_tokens,
            prompt_tokens,
            repeats,
            shape,
            dtype=getattr(torch, dtype),
            depth=depth,
        )
        print(json.dumps(rounded(found)))


if __name__ == "__main__":
    typer.run(main)
