"""Owns `degas bench engine` and `degas bench serve`: Degas beside other engines on the same weights. Runs in the main thread."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from rich.console import Console

from loadtest.bench.options import (
    BatchSizes,
    ComputeThreads,
    Cores,
    JsonFlag,
    LlamaCppPython,
    PromptTokens,
    RandomShape,
    Rounds,
    TransformersPython,
    VllmPython,
    whole,
)
from loadtest.tables import Figures, show

if TYPE_CHECKING:
    from loadtest.peers.file_bench import FileComparison


def engine(
    gguf: Annotated[
        Path | None, typer.Option(help="Instead: this file, as it is, in Degas and llama.cpp.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Instead: this folder of Hugging Face's layout.")] = None,
    shape: RandomShape = "30m",
    rows: BatchSizes = "1,8,32",
    prompt_tokens: PromptTokens = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens out.")] = 64,
    rounds: Rounds = 5,
    threads: Annotated[
        str, typer.Option(help="Compute threads of each engine; several with --gguf and --model.")
    ] = "1",
    cores: Cores = "",
    activations: Annotated[
        Literal["auto", "int8", "exact"],
        typer.Option(help="Degas, with --gguf: what activations are multiplied as (docs/operating.md)."),
    ] = "auto",
    transformers_python: TransformersPython = sys.executable,
    vllm_python: VllmPython = "",
    llama_cpp_python: LlamaCppPython = "",
    as_json: JsonFlag = False,
) -> None:
    """Degas's engine beside transformers, vLLM and llama.cpp: the same weights, a process each, turn about."""
    from loadtest.peers.catalog import Pythons, engine_peers
    from loadtest.peers.engine_bench import Workload, measure
    from loadtest.peers.file_bench import FileWorkload, measure_file
    from loadtest.peers.process import end_on_sigterm

    asked = whole("--rows", rows), prompt_tokens, new_tokens, rounds
    counts, on_cores = whole("--threads", threads), whole("--cores", cores)
    peers, left_out = engine_peers(Pythons(transformers_python, vllm_python, llama_cpp_python))
    end_on_sigterm()
    path = gguf or model
    try:
        if path is not None:
            if gguf is not None and model is not None:
                raise ValueError("give either --gguf or --model")
            load = FileWorkload(path, *asked, counts, on_cores, activations)
            one_file = measure_file(load, peers, left_out, say=_say)
            _print_file(one_file, as_json=as_json)
            return
        if len(counts) != 1:
            raise ValueError("--threads takes several numbers with --gguf and --model only")
        done = measure(Workload(shape, *asked, counts[0], on_cores), peers, left_out, say=_say)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _print_comparison(done, as_json=as_json)


def serve(
    shape: RandomShape = "30m",
    in_flight: Annotated[str, typer.Option(help="Requests at once, comma separated.")] = "1,16,64",
    prompt_tokens: PromptTokens = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens out.")] = 16,
    seconds: Annotated[float, typer.Option(help="New requests are sent for so long in each turn.")] = 8.0,
    grace: Annotated[float, typer.Option(help="Seconds the last requests of a turn have to end.")] = 20.0,
    rounds: Rounds = 3,
    threads: ComputeThreads = 1,
    cores: Cores = "",
    transformers_python: TransformersPython = sys.executable,
    vllm_python: VllmPython = "",
    llama_cpp_python: LlamaCppPython = "",
    llama_server: Annotated[str, typer.Option(help="llama.cpp's own llama-server, where built.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Degas over HTTP beside `transformers serve`, vLLM and llama.cpp: short streamed requests, turn about."""
    from loadtest.peers.catalog import Pythons
    from loadtest.peers.process import end_on_sigterm
    from loadtest.peers.serve_bench import Load, measure
    from loadtest.peers.servers import known_servers

    load = Load(
        shape,
        whole("--in-flight", in_flight),
        prompt_tokens,
        new_tokens,
        seconds,
        grace,
        rounds,
        threads,
        whole("--cores", cores),
    )
    pythons = Pythons(transformers_python, vllm_python, llama_cpp_python)
    servers, left_out = known_servers(pythons, llama_server)
    end_on_sigterm()
    try:
        done = measure(load, servers, left_out, say=_say)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _print_comparison(done, as_json=as_json)


class _Comparison(Protocol):
    left_out: list[str]

    def to_json(self) -> dict[str, Any]: ...
    def table(self) -> Figures: ...


def _say(line: str) -> None:
    """Print progress to stderr: stdout holds only the table or the JSON."""
    print(line, file=sys.stderr, flush=True)


def _print_file(done: FileComparison, *, as_json: bool) -> None:
    show(done.table(), done.figures(), as_json=as_json)
    for line in done.left_out if not as_json else ():
        Console().print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print_comparison(done: _Comparison, *, as_json: bool) -> None:
    show(done.table(), [done.to_json()], as_json=as_json)
    for line in done.left_out if not as_json else ():
        Console().print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
