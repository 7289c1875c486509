"""Owns `degas bench engine --gguf FILE` and `--model FOLDER`: one file in several engines, turn about. Main thread.

Degas and llama.cpp read the very same GGUF file; transformers reads what it holds, expanded. A folder is written as GGUF
for llama.cpp. As in `engine_bench`, all engines stay loaded, and one whose turn it is not is stopped.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loadtest.comparison import figure, median, median_ratio, rounded, times
from loadtest.peers.catalog import LLAMA_CPP, EnginePeer
from loadtest.peers.engine_bench import Field, Say, check_cores, check_counts
from loadtest.peers.side import Run, Spec
from loadtest.tables import Figures

PREFILL_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class FileWorkload:
    """What every engine is asked: `rows` greedy continuations at once, and one prompt of `PREFILL_TOKENS` alone."""

    path: Path
    rows: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 32
    new_tokens: int = 64
    rounds: int = 5
    threads: tuple[int, ...] = (1,)
    cores: tuple[int, ...] = ()  # empty: any
    activations: str = "auto"  # Degas's setting

    def check(self) -> None:
        """Raise ValueError naming the option and a safe value."""
        if not self.path.exists():
            raise ValueError(f"--gguf or --model: there is nothing at {self.path}")
        check_counts(self.rows, self.prompt_tokens, self.new_tokens, self.rounds, self.threads)
        check_cores(self.cores)


@dataclass(slots=True)
class FileComparison:
    """Every round by (threads, rows); rows 0 are the prompts alone. A line for each engine that is missing."""

    workload: FileWorkload
    format: str
    dtype: str
    rounds: dict[tuple[int, int], list[dict[str, Run]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def figures(self) -> list[dict[str, Any]]:
        """An object for each engine, number of threads and rows; rates are medians, ratios to llama.cpp within a round."""
        lines = []
        for (threads, rows), rounds in self.rounds.items():
            if rows == 0:
                continue
            prefill = self.rounds.get((threads, 0), [])
            for name in self.versions:
                runs = [one[name] for one in rounds if name in one]
                if not runs:
                    continue
                prompts = [one[name] for one in prefill if name in one]
                lines.append(
                    rounded(
                        {
                            "engine": name,
                            "format": self.format,
                            "rows": rows,
                            "threads": threads,
                            "decode_tps": median(run.decode_tokens_per_s for run in runs),
                            "prefill_tps": median(map(prefill_rate, prompts)),
                            "decode_ratio": median_ratio(
                                rounds, name, LLAMA_CPP, lambda run: run.decode_tokens_per_s
                            ),
                            "prefill_ratio": median_ratio(prefill, name, LLAMA_CPP, prefill_rate),
                            "rounds": len(runs),
                        }
                    )
                )
        return lines

    def table(self) -> Figures:
        """For the terminal, 80 columns wide."""
        load = self.workload
        table = Figures(
            f"{load.path.name} ({self.format}, activations in {self.dtype}): {load.prompt_tokens} tokens in, "
            f"{load.new_tokens} out, rounds in turns: {load.rounds}",
            ("threads", "rows", "engine", "decode/s", "×", "prefill/s", "×"),
            caption=f"medians; ×: to llama.cpp in the same round; prefill: one prompt of {PREFILL_TOKENS} tokens alone",
            left=("engine",),
        )
        for line in self.figures():
            table.add(
                str(line["threads"]),
                str(line["rows"]),
                line["engine"],
                figure(line["decode_tps"]),
                times(line["decode_ratio"]),
                figure(line["prefill_tps"]),
                times(line["prefill_ratio"]),
            )
        return table


def prefill_rate(run: Run) -> float | None:
    """Tokens a second of a prompt of `PREFILL_TOKENS`, up to its first token."""
    if run.decode_s is None:
        return None
    seconds = run.seconds - run.decode_s
    return PREFILL_TOKENS / seconds if seconds > 0 else None


def measure_file(
    workload: FileWorkload, peers: list[EnginePeer], left_out: list[str], say: Say = lambda line: None
) -> FileComparison:
    """Run every engine on one model. Raises ValueError for a workload out of bounds, or a model that cannot be opened.

    An engine that is not installed, fails or hangs is a line in `left_out`, never an exception.
    """
    from loadtest.peers.model_facts import model_facts

    workload.check()
    facts = model_facts(workload.path)
    done = FileComparison(workload, facts.format, facts.dtype, left_out=list(left_out))
    for threads in workload.threads:
        _measure_threads(done, peers, threads, facts.vocab_size, say)
    done.left_out = list(dict.fromkeys(done.left_out))
    return done


def _measure_threads(
    done: FileComparison, peers: list[EnginePeer], threads: int, vocab_size: int, say: Say
) -> None:
    load = done.workload
    engines = Field(threads, load.cores, done.versions, done.left_out, say)
    with tempfile.TemporaryDirectory(prefix="degas-engines-") as home, ExitStack() as stack:
        gguf = engines.start_all(peers, load.path, Path(home), stack)
        tokens = (max(load.prompt_tokens, PREFILL_TOKENS), load.new_tokens)
        for name in engines.names:
            spec = Spec(str(load.path), gguf, done.dtype, threads, max(load.rows), *tokens, load.activations)
            engines.load(name, spec)
        rng = random.Random(1)

        def measure(place: int, what: str, rows: int, length: int, new_tokens: int) -> None:
            def draw() -> list[list[int]]:
                return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(rows)]

            engines.warm(draw(), new_tokens)
            what = f"{threads} threads, {what}"
            done.rounds[threads, place] = engines.play(what, draw, new_tokens, load.rounds)

        measure(0, f"a prompt of {PREFILL_TOKENS} tokens", 1, PREFILL_TOKENS, 2)
        for rows in load.rows:
            measure(rows, f"{rows} rows", rows, load.prompt_tokens, load.new_tokens)
