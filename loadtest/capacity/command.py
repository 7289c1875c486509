"""Owns `degas simulate cluster`: options in, tables out. Runs in the main thread."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from loadtest.capacity.cluster import Cluster, Load, prompt_of
from loadtest.capacity.costs import BUILT_IN, Costs, CostsError, profiles, read_costs
from loadtest.capacity.planning import Shape, is_met, plan
from loadtest.capacity.simulation import Objective, Outcome, simulate
from loadtest.tables import Figures, show

SPLITS = {
    "": Shape(),
    "encoders": Shape(encoders=True),
    "prefills": Shape(prefills=True),
    "both": Shape(True, True),
}


def cluster(
    profile: Annotated[str, typer.Option(help="Whose costs; --profiles lists them.")] = "b200-moondream2",
    costs_path: Annotated[
        Path | None, typer.Option("--costs", help="A TOML file of costs of your own.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests that arrive each second, at random.")] = 100.0,
    prompt_tokens: Annotated[float, typer.Option(help="Tokens of a prompt, beside a picture's.")] = 30.0,
    output_tokens: Annotated[float, typer.Option(help="Mean tokens of an answer.")] = 30.0,
    fixed_lengths: Annotated[
        bool, typer.Option("--fixed-lengths", help="All answers as long; else they vary.")
    ] = False,
    picture_share: Annotated[
        float, typer.Option(help="Share of the requests with a picture that is new.")
    ] = 0.0,
    crops: Annotated[float, typer.Option(help="Crops of a picture.")] = 2.0,
    gateways: Annotated[int, typer.Option(help="Gateways, a core each.")] = 1,
    workers: Annotated[int, typer.Option(help="Workers that do everything.")] = 0,
    encoders: Annotated[int, typer.Option(help="Workers that only encode pictures.")] = 0,
    prefills: Annotated[int, typer.Option(help="Workers that only compute prompts.")] = 0,
    decodes: Annotated[int, typer.Option(help="Workers that only decode.")] = 0,
    queue: Annotated[int, typer.Option(help="Requests that may wait for one decoding worker.")] = 128,
    find: Annotated[
        bool, typer.Option("--find", help="Find how many of what the load needs, instead.")
    ] = False,
    split: Annotated[str, typer.Option(help="With --find: stages apart: encoders, prefills or both.")] = "",
    ttft_ms: Annotated[float, typer.Option(help="Good: first token within this. 0: any.")] = 1000.0,
    gap_ms: Annotated[float, typer.Option(help="Good: mean gap between tokens within this. 0: any.")] = 100.0,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 1,
    list_profiles: Annotated[bool, typer.Option("--profiles", help="List the profiles of the file.")] = False,
    print_costs: Annotated[
        bool, typer.Option("--print-costs", help="Print the built-in file of costs.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of objects instead of tables.")
    ] = False,
) -> None:
    """How a cluster of any size would serve a load: latencies, use of every stage, and what breaks first. From measured costs."""
    if print_costs:
        print(BUILT_IN.read_text(), end="")
        return
    try:
        if list_profiles:
            for name in profiles(costs_path):
                print(f"{name}: {read_costs(costs_path, name).device.source}")
            return
        costs = read_costs(costs_path, profile)
        load = Load(rate, prompt_tokens, output_tokens, picture_share, crops, fixed_lengths)
        objective = Objective(ttft_ms, gap_ms)
        started_s = time.perf_counter()
        if find:
            if any((workers, encoders, prefills, decodes)):
                raise ValueError(
                    "--find says how many of what: leave --workers, --encoders, --prefills, --decodes out"
                )
            if split not in SPLITS:
                raise ValueError(f"--split is {split!r}; encoders, prefills or both would work")
            outcome = plan(load, costs, SPLITS[split], objective, queue=queue, say=_say)
        else:
            if not (workers or prefills or decodes):
                workers = 1
            asked = Cluster(gateways, workers, encoders, prefills, decodes, queue)
            outcome = simulate(load, asked, costs, objective, seed=seed)
    except (CostsError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    took_s = time.perf_counter() - started_s
    if as_json:
        show("", [as_object(outcome, costs, objective)], as_json=True)
    else:
        console = Console()
        console.print(latency_table(outcome, costs, objective))
        console.print(stage_table(outcome))
        for line in _words(outcome, costs, took_s):
            console.print(Text(line, style="dim"), soft_wrap=True)
    raise typer.Exit(0 if is_met(outcome) else 1)


def as_object(outcome: Outcome, costs: Costs, objective: Objective) -> dict[str, Any]:
    """Plain values."""
    return {
        "profile": costs.name,
        "load": asdict(outcome.load),
        "cluster": asdict(outcome.cluster),
        "objective": asdict(objective),
        "is_met": is_met(outcome),
        "answered_per_s": round(outcome.answered_per_s, 2),
        "good_per_s": round(outcome.good_per_s, 2),
        "refused_share": round(outcome.refused_share, 5),
        **{
            name: {key: round(ms, 3) for key, ms in getattr(outcome, name).items()}
            for name in ("ttft_ms", "gap_ms", "total_ms")
        },
        "rows": round(outcome.rows, 2),
        "max_rows": outcome.max_rows,
        "stages": [
            {
                "name": stage.name,
                "members": stage.members,
                "capacity_per_s": round(stage.capacity, 2),
                "use": round(stage.use(outcome.load.rate), 4),
                "busy": round(_busy(outcome, stage.name), 4),
            }
            for stage in outcome.stages
        ],
        "breaks_first": outcome.first.name,
        "simulated": {
            "requests": outcome.num_requests,
            "seconds": round(outcome.seconds, 3),
            "part": round(outcome.simulated_part, 5),
        },
    }


def latency_table(outcome: Outcome, costs: Costs, objective: Objective) -> Figures:
    """What clients see."""
    load, asked = outcome.load, outcome.cluster
    who = ", ".join(
        f"{getattr(asked, name)} {name}"
        for name in ("gateways", "encoders", "prefills", "decodes", "workers")
        if getattr(asked, name)
    )
    pictures = (
        f", {load.picture_share:.0%} with a picture of {load.crops:g} crops" if load.picture_share else ""
    )
    title = f"{load.rate:g} requests/s of {load.prompt_tokens:g} + {load.output_tokens:g} tokens{pictures}; {who}; {costs.name}"
    columns = ("answered/s", "good/s", "refused", "", "mean ms", "p50", "p90", "p99", "objective")
    table = Figures(title, columns, left=("",))
    bounds = {"first token": objective.ttft_ms, "gap": objective.gap_ms, "whole answer": 0.0}
    for number, (name, given) in enumerate(
        zip(bounds, (outcome.ttft_ms, outcome.gap_ms, outcome.total_ms), strict=True)
    ):
        head = (f"{outcome.answered_per_s:.1f}", f"{outcome.good_per_s:.1f}", f"{outcome.refused_share:.1%}")
        figures = [f"{given[key]:.2f}" if given else "–" for key in ("mean", "p50", "p90", "p99")]
        table.add(
            *(head if number == 0 else ("", "", "")),
            name,
            *figures,
            f"≤ {bounds[name]:g}" if bounds[name] else "",
        )
    return table


def stage_table(outcome: Outcome) -> Figures:
    """What each stage does, the one that breaks first marked."""
    table = Figures(
        "stages: capacity by itself, were the others endless",
        ("stage", "members", "capacity/s", "asked of it", "busy", "full of", ""),
        left=("stage", "full of", ""),
    )
    for stage in outcome.stages:
        table.add(
            stage.name,
            str(stage.members),
            f"{stage.capacity:.1f}",
            f"{stage.use(outcome.load.rate):.0%}",
            f"{_busy(outcome, stage.name):.0%}",
            stage.unit,
            "breaks first" if stage is outcome.first else "",
        )
    return table


def _busy(outcome: Outcome, name: str) -> float:
    """The share of its members' time; of decoding workers that of their rows, since one row keeps a device busy."""
    if name in ("workers", "decodes"):
        return outcome.rows / outcome.max_rows if outcome.max_rows else 0.0
    return outcome.use.get(name, 0.0)


def _words(outcome: Outcome, costs: Costs, took_s: float) -> list[str]:
    first = outcome.first
    most = "" if outcome.simulated_part == 1 else f", of {outcome.simulated_part:.2%} of the cluster"
    lines = [
        f"What breaks first: {first.name} ({first.unit}), at {first.capacity:.1f} requests/s. "
        f"Simulated: {outcome.num_requests} requests over {outcome.seconds:.1f} s{most}, in {took_s:.1f} s.",
        f"Costs of the device: {costs.device.source}.",
        f"Costs of the gateway: {costs.gateway.source}.",
    ]
    if outcome.cluster.encoders or outcome.cluster.is_split:
        device, load, link = costs.device, outcome.load, costs.link
        moves = []
        if outcome.cluster.encoders and load.picture_share:
            moves.append(f"an encoded picture {link.seconds(device.feature_mb * 1e6) * 1e3:.1f} ms")
        if outcome.cluster.is_split:
            tokens = prompt_of(load, costs, has_picture=bool(load.picture_share))
            pages_ms = link.seconds(tokens * device.kv_bytes_per_token) * 1e3
            moves.append(f"the pages of {tokens:g} tokens {pages_ms:.1f} ms, before the first token")
        lines.append(f"Moving takes: {'; '.join(moves) or 'nothing here'}.")
        lines.append(f"Costs of the link: {costs.link.source}.")
    return lines


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
