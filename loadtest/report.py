"""Owns the forms of a result for people and programs: the terminal's table and the JSON. No clock, no sockets."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.calls import Tally
from loadtest.client import Result
from loadtest.histogram import Histogram

SCHEMA: Final = "degas.loadtest/1"
LATE_CLIENT_MS: Final = 5.0
BUSY_CLIENT_SHARE: Final = 0.8

NAMES: Final = {
    "all": "all",
    "query": "query · SSE",
    "chat": "chat · SSE",
    "responses": "responses · WS",
}


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
        "seconds": [asdict(second) for second in result.seconds],
    }


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
    return f"{how}, {result.elapsed_s:.1f} s, transport {scenario.transport}, {tokens}, seed {scenario.seed}"


def describe_slo(result: Result) -> str:
    """The objective in one line."""
    slo = result.scenario.slo
    limits = (("first token", slo.ttft_ms), ("every gap", slo.gap_ms), ("total", slo.total_ms))
    return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits if limit) or "ended well"


def terminal_report(result: Result) -> RenderableType:
    """The tables for the terminal."""
    parts: list[RenderableType] = [
        Text(describe_load(result), style="dim"),
        _latency_table(result),
        _rate_table(result),
    ]
    if result.all.errors:
        parts.append(_error_table(result.all))
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
    return [("all", result.all), *(others if len(others) > 1 else [])]


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
        table.add_row(NAMES[name], style="bold cyan")
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
        "ok/s",
        "good/s",
        "good",
        "tok/s",
    )
    for name, tally in ordered_groups(result):
        values = tally.summary(result.elapsed_s)
        table.add_row(
            NAMES[name],
            str(tally.sent),
            str(tally.ok),
            str(tally.refused),
            str(tally.errors.total() - tally.refused),
            f"{values['throughput_rps']:.1f}",
            f"{values['goodput_rps']:.1f}",
            f"{values['good_share']:.1%}",
            f"{values['tokens_per_s']:.0f}",
        )
    return table


def _error_table(tally: Tally) -> Table:
    table = _table("errors by code", "count")
    for code, count in tally.errors.most_common():
        table.add_row(code, str(count), style="red")
    return table


def format_ms(value_ms: float) -> str:
    """Milliseconds with as many digits as mean something."""
    if value_ms >= 100:
        return f"{value_ms:,.0f}"
    return f"{value_ms:.1f}" if value_ms >= 10 else f"{value_ms:.2f}"
