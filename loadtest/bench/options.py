"""Owns the options that several commands of `degas bench` share. Runs in the main thread."""

from __future__ import annotations

from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print a JSON list of objects instead of a table.")]
TransformersPython = Annotated[
    str, typer.Option(help="Python of transformers' environment; empty leaves it out.")
]
VllmPython = Annotated[str, typer.Option(help="Python of an environment with vLLM's CPU build.")]
Profile = Annotated[str, typer.Option(help="Whose step times: rtx3090, a100, h100, h200, b200, small.")]
BatchSizes = Annotated[str, typer.Option(help="Batch sizes, comma separated.")]
Seconds = Annotated[float, typer.Option(help="Measured time of each run.")]
Rounds = Annotated[int, typer.Option(help="Turns that each of the compared gets.")]
RandomShape = Annotated[str, typer.Option(help="Random Llama: 30m, 0.5b, or tiny for a smoke run.")]
PromptTokens = Annotated[int, typer.Option(help="Tokens in.")]
ComputeThreads = Annotated[int, typer.Option(help="Compute threads of each engine or server.")]
Cores = Annotated[
    str, typer.Option(help="Cores the engines or servers may use, comma separated; empty: any.")
]
LlamaCppPython = Annotated[str, typer.Option(help="Python with llama-cpp-python[server] and gguf.")]


def whole(option: str, given: str) -> tuple[int, ...]:
    """Whole numbers, comma separated. Raises typer.BadParameter naming the option."""
    try:
        return tuple(int(number) for number in given.split(",") if number.strip())
    except ValueError:
        raise typer.BadParameter(f"{given!r} is not whole numbers such as 1,8", param_hint=option) from None
