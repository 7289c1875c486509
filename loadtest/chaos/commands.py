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


def faults(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[FAULT]...", help="Only these; --list names all.")
    ] = None,
    streams: Annotated[
        int, typer.Option(help="Open while gateways are told to end and workers are killed.")
    ] = 200,
    seconds: Annotated[float, typer.Option(help="Of each stretch of the flood.")] = 3.0,
    list_names: Annotated[bool, typer.Option("--list", help="List the faults.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Do every promised fault for real, against services started here: what clients saw, how long it took, and the bound.

    Exit code 1 if a promise was broken or a fault could not be done. A busy machine breaks promises of times: run it on an idle one.
    """
    from loadtest.chaos.fault_list import catalogue, choose
    from loadtest.chaos.faults import Size, do, fault_table
    from loadtest.peers.process import end_on_sigterm

    if list_names:
        for fault in catalogue():
            print(f"{fault.name}: {fault.what}" + (f" (needs {fault.needs})" if fault.needs != "sim" else ""))
        return
    size = Size(streams, seconds)
    try:
        size.check()
        chosen = choose(names or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    end_on_sigterm()
    outcomes = []
    for number, fault in enumerate(chosen, 1):
        outcomes.append(do(fault, size))
        kept = "kept" if outcomes[-1].kept else "NOT KEPT"
        _say(f"{number}/{len(chosen)} {fault.name}: {kept} ({outcomes[-1].seconds:.0f} s)")
    if as_json:
        print(json.dumps([outcome.to_json() for outcome in outcomes], default=_plain))
    else:
        Console().print(fault_table(outcomes))
        for outcome in outcomes:
            if outcome.broken:
                Console().print(f"{outcome.fault.name}: {outcome.broken}", markup=False, highlight=False)
    raise typer.Exit(0 if all(outcome.kept for outcome in outcomes) else 1)


def _say(line: str) -> None:
    """Print progress to stderr: stdout holds only tables or the JSON."""
    print(line, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    return str(value)
