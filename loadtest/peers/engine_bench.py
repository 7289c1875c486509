"""Owns `degas bench engine`: the same weights in several engines, each in a process of its own, turn about. Main thread.

All engines are loaded once and stay loaded; an engine whose turn it is not is stopped (SIGSTOP), so that its idle
threads take no time from the others. Prompts are token ids, answers are greedy and exactly as long as asked.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from loadtest.comparison import figure, median, median_ratio, quicker, rounded, same_share, times, turns
from loadtest.peers.catalog import CONTINUOUS, SHAPES, TRANSFORMERS, EnginePeer, not_compared
from loadtest.peers.process import PeerError, PeerProcess, environment, last_words
from loadtest.peers.side import Run, Spec
from loadtest.tables import Figures

LOAD_TIMEOUT_S: Final = 300.0
RUN_TIMEOUT_S: Final = 300.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """What every engine is asked: `rows` greedy continuations at once, on as many cores and threads as the others."""

    shape: str = "30m"
    rows: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 32
    new_tokens: int = 64
    rounds: int = 5
    threads: int = 1
    cores: tuple[int, ...] = ()  # empty: any
    dtype: str = "bfloat16"

    def check(self) -> None:
        """Raise ValueError naming the option and a safe value."""
        if self.shape not in SHAPES:
            raise ValueError(f"--shape is {self.shape!r}; it is one of {', '.join(SHAPES)}")
        if self.new_tokens == 1:
            raise ValueError(
                "--new-tokens must be at least 2, not 1: decoding is what follows the first token"
            )
        check_counts(self.rows, self.prompt_tokens, self.new_tokens, self.rounds, (self.threads,))
        check_cores(self.cores)


def check_counts(
    rows: Sequence[int], prompt_tokens: int, new_tokens: int, rounds: int, threads: Sequence[int]
) -> None:
    """Raise ValueError naming the option that is out of bounds, and a safe value."""
    for option, value, low, high in (
        ("--rows", min(rows, default=0), 1, 256),
        ("--rows", max(rows, default=0), 1, 256),
        ("--prompt-tokens", prompt_tokens, 1, 1024),
        ("--new-tokens", new_tokens, 2, 1024),
        ("--rounds", rounds, 1, 1000),
        ("--threads", min(threads, default=0), 1, os.cpu_count() or 1),
        ("--threads", max(threads, default=0), 1, os.cpu_count() or 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{option} must be between {low} and {high}, not {value}")


def check_cores(cores: tuple[int, ...]) -> None:
    """Raise ValueError unless this process may run on them."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(cores)
    if not set(cores) <= allowed:
        raise ValueError(f"--cores must be among {sorted(allowed)}, not {sorted(cores)}")


@dataclass(slots=True)
class Comparison:
    """Every round at every number of rows, and a line for each engine that is missing."""

    workload: Workload
    parameters: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    rounds: dict[int, list[dict[str, Run]]] = field(default_factory=dict)
    notes: dict[int, dict[str, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def figures(self) -> list[dict[str, Any]]:
        """A line for each number of rows and engine.

        Ratios are to the quicker form of transformers in the same round; decode ratios and same tokens to its
        `generate`, the only one that tells when a first token came.
        """
        lines = []
        for rows, rounds in self.rounds.items():
            for name in self.versions:
                runs = [one[name] for one in rounds if name in one]
                if runs:
                    lines.append(self._figures(rows, name, rounds, runs))
        return lines

    def _figures(self, rows: int, name: str, rounds: list[dict[str, Run]], runs: list[Run]) -> dict[str, Any]:
        best = quicker(rounds, (TRANSFORMERS, CONTINUOUS), lambda run: run.tokens_per_s)

        def ratio(figure: Callable[[Run], float | None], reference: str = TRANSFORMERS) -> float | None:
            return median_ratio(rounds, name, reference, figure)

        paired = [(one[name], one[TRANSFORMERS]) for one in rounds if name in one and TRANSFORMERS in one]
        return rounded(
            {
                "rows": rows,
                "engine": name,
                "reference": best,
                "rounds": len(runs),
                "tokens_per_s": median(run.tokens_per_s for run in runs),
                "tokens_per_cpu_s": median(run.tokens_per_cpu_s for run in runs),
                "ratio": ratio(lambda run: run.tokens_per_s, best),
                "cpu_ratio": ratio(lambda run: run.tokens_per_cpu_s, best),
                "decode_tokens_per_s": median(run.decode_tokens_per_s for run in runs),
                "decode_ratio": ratio(lambda run: run.decode_tokens_per_s),
                "decode_cpu_ratio": ratio(lambda run: run.decode_tokens_per_cpu_s),
                "same_tokens": median(same_share(ours.tokens, theirs.tokens) for ours, theirs in paired),
                "note": self.notes.get(rows, {}).get(name, ""),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the tokens themselves."""
        return {
            "workload": asdict(self.workload),
            "parameters": self.parameters,
            "versions": self.versions,
            "figures": self.figures(),
            "runs": [
                {
                    "rows": rows,
                    "engine": name,
                    "round": index,
                    **rounded({"seconds": run.seconds, "cpu_s": run.cpu_s, "decode_s": run.decode_s}, 5),
                }
                for rows, rounds in self.rounds.items()
                for index, one in enumerate(rounds)
                for name, run in one.items()
            ],
            "left_out": self.left_out,
        }

    def table(self) -> Figures:
        """For the terminal, 80 columns wide."""
        load = self.workload
        table = Figures(
            f"{load.shape} Llama ({self.parameters / 1e6:.0f}M, {load.dtype}): {load.prompt_tokens} tokens in, "
            f"{load.new_tokens} out, threads: {load.threads}, rounds in turns: {load.rounds}",
            ("rows", "engine", "tokens/s", "×", "×cpu", "decode/s", "×", "×cpu", "same"),
            caption="×: to the quicker form of transformers in the same round, the median; ×cpu: the same by CPU "
            "time; decode: after each row's first token, × to generate; same: tokens equal to generate's; (cb): continuous batching. "
            + self._choices(),
            left=("engine",),
        )
        for line in self.figures():
            same = line["same_tokens"]
            table.add(
                str(line["rows"]),
                line["engine"],
                figure(line["tokens_per_s"]),
                times(line["ratio"]),
                times(line["cpu_ratio"]),
                figure(line["decode_tokens_per_s"]),
                times(line["decode_ratio"]),
                times(line["decode_cpu_ratio"]),
                "–" if same is None else f"{same:.1%}",
            )
        return table

    def _choices(self) -> str:
        """What each engine chose while warming up."""
        return "; ".join(
            f"{name} at {rows}: {note}"
            for rows, notes in self.notes.items()
            for name, note in notes.items()
            if note
        )


def run_from(answer: dict[str, Any], rows: int, new_tokens: int) -> Run:
    """An engine's answer as a run. Raises PeerError when it is not what was asked for."""
    try:
        run = Run(**answer)
        sizes = {len(row) for row in run.tokens}
    except TypeError as error:
        raise PeerError(f"an answer that is not a run: {error}") from None
    if len(run.tokens) != rows or sizes != {new_tokens}:
        raise PeerError(f"{len(run.tokens)} rows of {sorted(sizes)} tokens, not {rows} of {new_tokens}")
    if run.seconds <= 0 or run.cpu_s <= 0:
        raise PeerError("a run that took no time")
    return run


class Field:
    """The engines that are up. What they are is told in `versions`; one that fails leaves with a line in `left_out`."""

    def __init__(
        self, threads: int, cores: Sequence[int], versions: dict[str, str], left_out: list[str], say: Say
    ) -> None:
        self._threads = threads
        self._cores = list(cores)
        self._versions = versions
        self._left_out = left_out
        self._say = say
        self._up: dict[str, PeerProcess] = {}

    @property
    def names(self) -> list[str]:
        """The engines that are up, in the order in which they started."""
        return list(self._up)

    def start(self, peer: EnginePeer, home: Path, stack: ExitStack) -> None:
        """Start an engine's process; until it is asked, all it does is import its libraries."""
        log = home / f"engine-{len(self._up)}.log"
        try:
            variables = environment(peer.python, self._threads, home / "foreign")
            process = PeerProcess(peer.name, peer.command, variables, log, self._cores)
        except PeerError as error:
            self.drop(peer.name, error)
            return
        self._up[peer.name] = stack.enter_context(process)

    def start_all(self, peers: Sequence[EnginePeer], model: Path, home: Path, stack: ExitStack) -> str:
        """Start every engine; returns the GGUF file for those that need one: `model` itself, or written from that folder."""
        gguf = str(model) if model.is_file() else ""
        for peer in peers:
            try:
                if peer.needs_gguf and not gguf:
                    gguf = write_gguf(peer.python, model, home)
            except PeerError as error:
                self.drop(peer.name, error)
                continue
            self.start(peer, home, stack)
        return gguf

    def load(self, name: str, spec: Spec) -> None:
        """Have an engine load the weights, and leave it paused."""
        self._say(f"loading {name}")
        try:
            answer = self._up[name].ask("load", LOAD_TIMEOUT_S, **asdict(spec))
        except PeerError as error:
            self.drop(name, error)
            return
        self._versions[name] = answer["version"]
        self._up[name].pause()

    def ask(self, name: str, op: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any] | None:
        """One engine's answer while the others are stopped; None when it fails, which takes it out."""
        process = self._up[name]
        process.resume()
        try:
            answer = process.ask(op, RUN_TIMEOUT_S, prompts=prompts, new_tokens=new_tokens)
        except PeerError as error:
            self.drop(name, error)
            return None
        process.pause()
        return answer

    def run(self, name: str, prompts: list[list[int]], new_tokens: int) -> Run | None:
        """One measured run; None when it fails."""
        answer = self.ask(name, "run", prompts, new_tokens)
        if answer is None:
            return None
        try:
            return run_from(answer, len(prompts), new_tokens)
        except PeerError as error:
            self.drop(name, error)
            return None

    def warm(self, prompts: list[list[int]], new_tokens: int) -> dict[str, str]:
        """Let every engine run unmeasured; returns what each one chose, or an empty text."""
        notes = {}
        for name in self.names:
            answer = self.ask(name, "warm", prompts, new_tokens)
            notes[name] = str(answer.get("note", "")) if answer else ""
        return notes

    def play(
        self, what: str, draw: Callable[[], list[list[int]]], new_tokens: int, num_rounds: int
    ) -> list[dict[str, Run]]:
        """Measure every engine in turns, with prompts drawn anew for each round."""
        rounds: list[dict[str, Run]] = []
        for order in turns(self.names, num_rounds):
            self._say(f"{what}, round {len(rounds) + 1} of {num_rounds}")
            prompts = draw()
            done: dict[str, Run] = {}
            for name in order:
                run = self.run(name, prompts, new_tokens) if name in self._up else None
                if run is not None:
                    done[name] = run
            rounds.append(done)
        return rounds

    def drop(self, name: str, error: PeerError) -> None:
        """Take an engine out, with a line that says why."""
        process = self._up.pop(name, None)
        if process is not None:
            process.stop()
        line = not_compared(name, str(error))
        self._left_out.append(line)
        self._say(line)


def write_gguf(python: str, folder: Path, home: Path) -> str:
    """The checkpoint as GGUF, written in llama.cpp's environment. Raises PeerError."""
    target, log = home / "model.gguf", home / "gguf.log"
    command = [python, "-m", "loadtest.peers.gguf_writer", str(folder), str(target)]
    variables = environment(python, 1, home / "foreign")
    try:
        with log.open("wb") as output:
            done = subprocess.run(
                command, env=variables, stdout=output, stderr=output, timeout=LOAD_TIMEOUT_S, check=False
            )
    except subprocess.TimeoutExpired:
        raise PeerError(f"writing GGUF took more than {LOAD_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise PeerError(f"cannot start {python}: {error.strerror}") from None
    if done.returncode:
        raise PeerError(f"no GGUF was written: {last_words(log)}")
    return str(target)


def measure(
    workload: Workload, peers: list[EnginePeer], left_out: list[str], say: Say = lambda line: None
) -> Comparison:
    """Run every engine `rounds` times at each number of rows. Raises ValueError for a workload out of bounds.

    An engine that is not installed, fails or hangs is a line in `left_out`, never an exception.
    """
    from loadtest.peers.checkpoint import vocab_size, write_checkpoint

    workload.check()
    comparison = Comparison(workload, left_out=list(left_out))
    field = Field(workload.threads, workload.cores, comparison.versions, comparison.left_out, say)
    with tempfile.TemporaryDirectory(prefix="degas-engines-") as home_name, ExitStack() as stack:
        home = Path(home_name)
        folder = home / "checkpoint"
        say(f"writing a random {workload.shape} checkpoint")
        comparison.parameters = write_checkpoint(folder, workload.shape)
        gguf = field.start_all(peers, folder, home, stack)
        most = max(workload.rows)
        for name in field.names:
            tokens = (workload.prompt_tokens, workload.new_tokens)
            field.load(name, Spec(str(folder), gguf, workload.dtype, workload.threads, most, *tokens))
        play(comparison, field, vocab_size(workload.shape))
    return comparison


def play(comparison: Comparison, field: Field, vocab_size: int) -> None:
    """Warm up and measure every engine that is up, in turns; token ids of the prompts are below `vocab_size`."""
    workload, rng = comparison.workload, random.Random(1)

    def draw(rows: int) -> list[list[int]]:
        return [[rng.randrange(vocab_size) for _ in range(workload.prompt_tokens)] for _ in range(rows)]

    for rows in workload.rows:
        comparison.notes[rows] = field.warm(draw(rows), workload.new_tokens)
        comparison.rounds[rows] = field.play(
            f"{rows} rows", partial(draw, rows), workload.new_tokens, workload.rounds
        )
