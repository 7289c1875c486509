"""Owns `degas soak` and `degas faults`: options in, tables or JSON out, the exit code tells. Runs in the main thread."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print a JSON list of objects instead of tables.")]


def soak(
    model: Annotated[
        str,
        typer.Option(help="sim, the simulated device, or pocket; several, comma separated, share the time."),
    ] = "sim,pocket",
    seconds: Annotated[float, typer.Option(help="Seconds of traffic, of all models together.")] = 7200.0,
    rate: Annotated[float, typer.Option(help="Requests that arrive each second, of all kinds.")] = 10.0,
    blow_every: Annotated[
        float, typer.Option(help="Seconds from one killed or stopped process to the next; 0: none.")
    ] = 300.0,
    gateways: Annotated[int, typer.Option(help="Gateways on one port.")] = 2,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Mixed traffic for hours against a server started here, whose processes are killed: what grows, what fails, what is left.

    Exit code 1 if a promise was broken. Slopes are judged only over half an hour and more.
    """
    from loadtest.chaos.soak import Plan
    from loadtest.chaos.soak import soak as run
    from loadtest.chaos.soak_report import Verdict

    models = [name.strip() for name in model.split(",") if name.strip()]
    plans = [
        Plan(name, seconds / max(1, len(models)), rate, blow_every, gateways, seed, max_tokens)
        for name in models
    ]
    try:
        if not plans:
            raise ValueError("model is empty; sim or pocket would work")
        for plan in plans:
            plan.check()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    verdicts = []
    for plan in plans:
        _say(f"{plan.model}: {plan.seconds / 60:.1f} min in {plan.legs} legs")
        verdicts.append(Verdict(run(plan, _say)))
        if not as_json:
            for table in verdicts[-1].tables():
                Console().print(table)
    if as_json:
        print(json.dumps([verdict.to_json() for verdict in verdicts], default=_plain))
    raise typer.Exit(0 if all(verdict.is_clean for verdict in verdicts) else 1)


def _say(line: str) -> None:
    """Print progress to stderr: stdout holds only tables or the JSON."""
    print(line, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    return str(value)
