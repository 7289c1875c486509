"""Owns `degas bench gateway`: its options and what it prints. Runs in the main thread."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from loadtest.gateway.environment import ReferenceError, reference_python
from loadtest.gateway.measure import LOADS, measure, open_streams, table
from loadtest.gateway.stacks import BenchError, Load
from loadtest.peers.process import end_on_sigterm
from loadtest.tables import show


def _say(line: str) -> None:
    """Print progress to stderr: stdout holds only the table or the JSON."""
    print(line, file=sys.stderr, flush=True)


def gateway(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of objects instead of a table.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON list to this file.")] = None,
    only: Annotated[str, typer.Option(help="Only these transports: some of sse, websocket, http.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns that each stack gets.")] = 3,
    seconds: Annotated[float, typer.Option(help="Measured time of each turn.")] = 4.0,
    streams: Annotated[int, typer.Option(help="At most so many streams at once, for a smoke run.")] = 10_000,
    open_streams_: Annotated[
        int,
        typer.Option(
            "--open-streams", help="Also: memory of so many streams at a token a second each; 0: not."
        ),
    ] = 0,
    reference: Annotated[
        bool, typer.Option(help="Also measure FastAPI on uvicorn, a pydantic chunk a token, turn about.")
    ] = True,
    reference_python_: Annotated[
        str,
        typer.Option("--reference-python", help="Python of its environment; empty: make one in the cache."),
    ] = "",
) -> None:
    """Processor time of the gateway a streamed token and a short request, beside the usual stack before the same engine."""
    end_on_sigterm()
    try:
        loads = _loads(only, streams, open_streams_)
        python = (reference_python_ or str(reference_python(_say))) if reference else None
        done = measure(loads, rounds=rounds, seconds=seconds, reference=python, say=_say)
    except (ValueError, ReferenceError) as error:
        raise typer.BadParameter(str(error)) from None
    except BenchError as error:
        typer.echo(f"degas bench gateway: {error}", err=True)
        raise typer.Exit(1) from None
    objects = [row.to_json() for row in done]
    if out is not None:
        out.write_text(json.dumps(objects, indent=1) + "\n")
    show(table(done), objects, as_json=as_json)


def _loads(only: str, most: int, num_open: int) -> list[Load]:
    """Raises ValueError for transports that there are not."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {load.transport for load in LOADS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{unknown[0]!r} is not a transport; --only takes some of {', '.join(sorted(known))}"
        )
    if most < 1:
        raise ValueError("--streams is at least 1")
    loads = [
        Load(load.transport, min(load.streams, most), load.rate)
        for load in LOADS
        if not names or load.transport in names
    ]
    return [*loads, *([open_streams(num_open)] if num_open else [])]
