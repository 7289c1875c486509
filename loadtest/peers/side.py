"""Owns an engine's end of the pipe: JSON lines in, JSON lines out, two clocks. Main thread of the engine's process.

Standard library only, so that it runs in any engine's environment. The parent sends `{"op": "load" | "warm" | "run"}`
objects and gets one object back for each; whatever the engine prints goes to the log instead of the pipe.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Stamp = tuple[float, float]
"""Wall-clock seconds, and CPU seconds of this process, all its threads together."""


def read_clocks() -> Stamp:
    """Now, by both clocks."""
    return time.perf_counter(), time.process_time()


@dataclass(frozen=True, slots=True)
class Spec:
    """What an engine is to load, and the most it will be asked for. `folder` has the layout of Hugging Face."""

    folder: str
    gguf: str  # the same weights for llama.cpp; "" where there are none
    dtype: str  # "bfloat16" or "float32"
    threads: int
    max_rows: int
    prompt_tokens: int
    new_tokens: int
    activations: str = "auto"  # Degas alone: what they are multiplied as where weights are in blocks


@dataclass(frozen=True, slots=True)
class Run:
    """One run: the new tokens of each row, and its seconds by the wall clock and of CPU time.

    `decode_s` and `decode_cpu_s` count from the moment the last row had its first token, None where the engine
    does not tell; the whole run counts from the submission of token ids to the last token.
    """

    tokens: list[list[int]]
    seconds: float
    cpu_s: float
    decode_s: float | None = None
    decode_cpu_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(len(row) for row in self.tokens)

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second of the whole run, prompts included in the time."""
        return self.num_tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        """The same by CPU time."""
        return self.num_tokens / self.cpu_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after each row's first, a second of decoding."""
        return (self.num_tokens - len(self.tokens)) / self.decode_s if self.decode_s else None

    @property
    def decode_tokens_per_cpu_s(self) -> float | None:
        """The same by CPU time."""
        return (self.num_tokens - len(self.tokens)) / self.decode_cpu_s if self.decode_cpu_s else None


def timed_run(tokens: list[list[int]], start: Stamp, first: Stamp | None, end: Stamp) -> Run:
    """A run from its stamps; `first` is when the last row had its first token."""
    decode = (None, None) if first is None else (end[0] - first[0], end[1] - first[1])
    return Run(tokens, end[0] - start[0], end[1] - start[1], *decode)


class Engine(Protocol):
    """What a peer's file makes of a `Spec`."""

    version: str
    """The engine's name and version, for the report."""

    def warm(self, prompts: list[list[int]], new_tokens: int) -> str:
        """Unmeasured: warm up, choose between ways to run; returns what was chosen, or an empty string."""

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Greedily continue every prompt by exactly `new_tokens`."""


Make = Callable[[Spec], Engine]


def load_attribute(module: str, name: str) -> Any:
    """`name` of a module that the project does not depend on; without types, whether it is installed or not."""
    return getattr(importlib.import_module(module), name)


def serve(make: Make) -> None:
    """Answer the parent's requests until the pipe ends. An exception is an answer too: the parent decides."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engine: Engine | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: dict[str, Any]
            match asked.pop("op"):
                case "load":
                    engine = make(Spec(**asked))
                    answer = {"version": engine.version}
                case "warm" if engine is not None:
                    answer = {"note": engine.warm(**asked)}
                case "run" if engine is not None:
                    answer = asdict(engine.run(**asked))
                case other:
                    answer = {"error": f"{other!r} is not known, or nothing is loaded yet"}
        except Exception as error:  # any library's, of any kind
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
