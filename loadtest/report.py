"""Owns the forms of a result for people and programs: the terminal's table and the JSON. No clock, no sockets."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loadtest.calls import Tally
from loadtest.client import Result
from loadtest.histogram import Histogram
from loadtest.questions import long_prompt_tokens

SCHEMA: Final = "degas.loadtest/1"
LATE_CLIENT_MS: Final = 5.0
BUSY_CLIENT_SHARE: Final = 0.8

NAMES: Final = {
    "all": "all",
    "query": "query · SSE",
    "chat": "chat · SSE",
    "responses": "responses · WS",
    "completions": "completions · SSE",
}


def name_of(group: str) -> str:
    """A group's name for people: an interface, or a kind of request."""
    return NAMES.get(group, group.replace("kind:", "kind: "))


def to_json(result: Result) -> dict[str, Any]:
    """The whole result as plain data. Latencies in milliseconds; `hdr` strings decode with any HdrHistogram."""
    return {
        "schema": SCHEMA,
        "started_at": result.started_at,
        "scenario": result.scenario.public(),
        "loop": "open" if result.scenario.is_open_loop else "closed",
        "elapsed_s": round(result.elapsed_s, 3),
        "stopped": result.stopped,
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "client": {"cpu_share": round(result.client_cpu_share, 3), "lateness_ms": result.lateness.summary()},
        "warnings": find_warnings(result),
        **{name: tally.summary(result.elapsed_s) for name, tally in result.groups.items() if name == "all"},
        "surfaces": {
            name: tally.summary(result.elapsed_s) for name, tally in result.groups.items() if name != "all"
        },
        "kinds": {name: tally.summary(result.elapsed_s) for name, tally in result.kinds.items()},
        "costs": costs(result),
        "still_in_flight": result.still_in_flight,
        "seconds": [asdict(second) for second in result.seconds],
    }


def costs(result: Result) -> dict[str, float]:
    """What the run cost, as far as prices and meters are known; whole devices, idle time included."""
    found: dict[str, float] = {}
    tokens = sum(tally.tokens for tally in result.kinds.values())
    if result.cost:
        found["cost"] = round(result.cost, 6)
        found["tokens_per_currency"] = round(tokens / result.cost, 1)
    if result.joules is not None:
        found["joules"] = round(result.joules, 3)
        if tokens:
            found["joules_per_token"] = round(result.joules / tokens, 4)
    return found


def figures_of_cost(result: Result) -> list[tuple[str, str, str]]:
    """Cost and energy as (figure, unit, what it is); none where nothing is known."""
    found = costs(result)
    figures: list[tuple[str, str, str]] = []
    if "tokens_per_currency" in found:
        figures.append(
            (f"{found['tokens_per_currency']:,.0f}", "", "tokens per currency unit, idle time included")
        )
    if "joules_per_token" in found:
        figures.append((f"{found['joules_per_token']:.3g}", "J", "energy a token, the whole device's"))
    return figures


def error_text(tally: Tally, code: str) -> str:
    """What the first error of a code said."""
    return tally.first_errors.get(code, "")


def find_warnings(result: Result) -> list[str]:
    """What a reader must know before believing the figures."""
    found: list[str] = []
    if result.stopped:
        found.append(f"Ended early: {result.stopped}.")
    if not result.scenario.is_open_loop:
        found.append(
            "Closed loop: requests waited for each other, so latencies hide queueing. Use --rate to measure latency."
        )
    late_ms = result.lateness.percentile_ms(99)
    if late_ms > LATE_CLIENT_MS:
        found.append(f"This client sent late (p99 {late_ms:.1f} ms); latencies include that.")
    if result.client_cpu_share > BUSY_CLIENT_SHARE:
        found.append(
            f"This client used {result.client_cpu_share:.0%} of a core: the figures may be its limit, not the server's."
        )
    if result.still_in_flight:
        found.append(
            f"{result.still_in_flight} requests were still under way in the server seconds after the end."
        )
    if result.all.empty:
        found.append(f"{result.all.empty} requests ended well without any output.")
    return found


def describe_load(result: Result) -> str:
    """The load in one line."""
    scenario = result.scenario
    how = (
        f"open loop, {scenario.rate:g} arrivals/s (Poisson)"
        if scenario.is_open_loop
        else f"closed loop, {scenario.in_flight} in flight"
    )
    tokens = f"{scenario.min_tokens} to {scenario.max_tokens} output tokens"
    if scenario.kind == "bursts":
        how = f"open loop, bursts of {scenario.burst}, {scenario.rate:g} arrivals/s"
    by = f", {scenario.processes} processes" if scenario.processes > 1 else ""
    return (
        f"{how}, {result.elapsed_s:.1f} s, transport {scenario.transport}, {tokens}, seed {scenario.seed}{by}"
    )


def describe_target(result: Result) -> str:
    """What was asked, in one line: the model, and what its questions were."""
    scenario, target = result.scenario, result.scenario.target
    kind = "pictures and texts" if target.takes_images else "texts only"
    parts = [scenario.model or "the default model", kind, " + ".join(dict.fromkeys(scenario.surfaces))]
    if scenario.kind == "chat":
        parts.append(f"conversations of {scenario.turns} turns")
    if scenario.kind in ("long", "mixed"):
        parts.append(f"long prompts of about {long_prompt_tokens(scenario)} tokens")
    if not target.is_degas:
        parts.append("not Degas")
    return ", ".join(parts)


def describe_slo(result: Result) -> str:
    """The objective in one line."""
    slo = result.scenario.slo
    limits = (("first token", slo.ttft_ms), ("every gap", slo.gap_ms), ("total", slo.total_ms))
    return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits if limit) or "ended well"


def terminal_report(result: Result) -> RenderableType:
    """The tables for the terminal."""
    parts: list[RenderableType] = [
        Text(f"{result.scenario.kind}: {describe_target(result)}", style="dim"),
        Text(describe_load(result), style="dim"),
        _latency_table(result),
        _rate_table(result),
    ]
    for name, tally in (("all", result.all), ("slow readers", result.kinds.get("slow"))):
        if tally is not None and tally.errors:
            parts += _errors(name, tally)
    parts += [Text(f"{what}: {value} {unit}".rstrip()) for value, unit, what in figures_of_cost(result)]
    parts.append(
        Text(
            f"client: {result.client_cpu_share:.0%} of a core, sent late by p50 "
            f"{result.lateness.percentile_ms(50):.2f} / p99 {result.lateness.percentile_ms(99):.2f} ms",
            style="dim",
        )
    )
    parts += [Text(f"! {warning}", style="yellow") for warning in find_warnings(result)]
    return Group(*parts)


def ordered_groups(result: Result) -> list[tuple[str, Tally]]:
    """`all` first, then the interfaces by name; a lone interface is not repeated."""
    others = sorted((name, tally) for name, tally in result.groups.items() if name != "all")
    kinds = sorted((f"kind:{name}", tally) for name, tally in result.kinds.items())
    groups = [("all", result.all)]
    for more in (others, kinds):
        if len(more) > 1:
            groups += more
    return groups


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _latency_table(result: Result) -> Table:
    table = _table(
        "latency from the scheduled arrival, ms", "count", "p50", "p90", "p99", "p99.9", "max", "mean"
    )
    for name, tally in ordered_groups(result):
        table.add_row(name_of(name), style="bold cyan")
        for label, histogram in latencies(tally):
            if len(histogram):
                values = [histogram.percentile_ms(percentile) for percentile in (50, 90, 99, 99.9)]
                cells = [format_ms(value) for value in (*values, histogram.max_ms, histogram.mean_ms)]
                table.add_row(f"  {label}", str(len(histogram)), *cells)
    return table


def latencies(tally: Tally) -> tuple[tuple[str, Histogram], ...]:
    """The kinds of latency in the order they are shown."""
    return (
        ("first token", tally.ttft),
        ("gap", tally.gap),
        ("total", tally.total),
        ("failed or refused", tally.refusal),
    )


def _rate_table(result: Result) -> Table:
    table = _table(
        f"rates (good: {describe_slo(result)})",
        "sent",
        "ok",
        "429",
        "errors",
        "left",
        "ok/s",
        "good/s",
        "good",
        "tok/s",
    )
    for name, tally in ordered_groups(result):
        values = tally.summary(result.elapsed_s)
        table.add_row(
            name_of(name),
            str(tally.sent),
            str(tally.ok),
            str(tally.refused),
            str(tally.errors.total() - tally.refused),
            str(tally.left),
            f"{values['throughput_rps']:.1f}",
            f"{values['goodput_rps']:.1f}",
            f"{values['good_share']:.1%}",
            f"{values['tokens_per_s']:.0f}",
        )
    return table


def _errors(name: str, tally: Tally) -> list[RenderableType]:
    """Counts by code, and below each what the first of them said: a code alone sends nobody to the cause."""
    lines: list[RenderableType] = [Text(f"errors by code ({name})", style="bold")]
    for code, count in tally.errors.most_common():
        lines.append(Text(f"  {count:>6}  {code}", style="red"))
        if said := error_text(tally, code):
            lines.append(Padding(Text(said), (0, 0, 0, 10)))
    return lines


def format_ms(value_ms: float) -> str:
    """Milliseconds with as many digits as mean something."""
    if value_ms >= 100:
        return f"{value_ms:,.0f}"
    return f"{value_ms:.1f}" if value_ms >= 10 else f"{value_ms:.2f}"
