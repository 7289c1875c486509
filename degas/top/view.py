"""Owns how figures look on a terminal of 80 columns or more. Figures in, tables out."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from degas.top.figures import Figures, GatewayFigures, ModelFigures, WorkerFigures

_NAME_CHARS = 18


def render(figures: Figures, clock: str) -> RenderableType:
    """The whole view."""
    over = f"over the last {figures.over_s:.1f} s" if figures.over_s else "since each process' start"
    names = {one.url: f"g{index}" for index, one in enumerate(figures.gateways, 1)}
    parts: list[RenderableType] = [
        Text.assemble(("degas top", "bold"), (f"  {clock}  rates and times {over}", "dim"))
    ]
    parts += [_state_line(names[one.url], one) for one in figures.gateways]
    there = [one for one in figures.gateways if one.is_there]
    if there:
        legend = "refused, errors: a second; first, p99: time to first token; gap: the median"
        parts += [Text(), _gateways(there, names), Text(legend, style="dim")]
    if figures.workers:
        legend = "step: the device's time, host: the loop's; bubble: device idle with work at hand"
        parts += [Text(), _workers(figures.workers, names), Text(legend, style="dim")]
        parts += [_worker_line(_worker_name(one, names), one) for one in figures.workers if one.is_up]
    if figures.models:
        parts += [Text(), *(_model_line(one) for one in figures.models)]
    if any(one["tenant"] for one in figures.tenants):
        parts += [Text(), _tenants(figures.tenants)]
    return Group(*parts)


def _state_line(name: str, one: GatewayFigures) -> Text:
    """A gateway's address and state, and what is unusual about it."""
    notes = [f"{one.recovering} waiting for a new worker"] if one.recovering else []
    notes += [f"{one.pictures_pending} pictures being decoded"] if one.pictures_pending else []
    notes += [f"{one.workers_lost} workers lost so far"] if one.workers_lost else []
    style = "red" if not one.is_there else "green" if one.state == "ready" else "yellow"
    line = Text.assemble(f"{name} {_clean(one.url)}  ", (_clean(one.state), style))
    return line.append("  " + ", ".join(notes), style="yellow") if notes else line


def _gateways(gateways: list[GatewayFigures], names: dict[str, str]) -> Table:
    table = _table("", "streams", "req/s", "refused", "errors", "tok/s", "first", "p99", "gap", "workers")
    for one in gateways:
        table.add_row(
            names[one.url],
            str(one.streams),
            number(one.requests_per_s),
            number(one.refused_per_s),
            number(one.errors_per_s),
            number(one.tokens_per_s),
            milliseconds(one.ttft_p50_ms),
            milliseconds(one.ttft_p99_ms),
            milliseconds(one.gap_p50_ms),
            f"{one.workers_up}/{one.workers}",
        )
    return table


def _workers(workers: list[WorkerFigures], names: dict[str, str]) -> Table:
    table = _table("worker", "run", "wait", "tok/s", "rows", "step", "host", "bubble", "pages", "prefix")
    for one in workers:
        name = _worker_name(one, names)
        if not one.is_up:
            table.add_row(Text(name, style="red"), Text("down", style="red"))
            continue
        used = one.pages_used / one.pages if one.pages else None
        table.add_row(
            Text(name),
            str(one.running),
            Text(str(one.waiting), style="yellow" if one.waiting else ""),
            number(one.tokens_per_s),
            number(one.rows_per_step),
            milliseconds(one.step_ms),
            milliseconds(one.host_ms),
            share(one.bubble_share),
            share(used),
            share(one.prefix_hit_share),
        )
    return table


def _worker_name(one: WorkerFigures, names: dict[str, str]) -> str:
    return _short(f"{names[one.gateway]}/{_clean(one.worker)} {_clean(one.model)}".strip(), _NAME_CHARS)


def _worker_line(name: str, one: WorkerFigures) -> Text:
    notes = [_clean(one.device)] if one.device else []
    notes += [f"prompts {number(one.prompt_tokens_per_s)} tok/s"] if one.prompt_tokens_per_s else []
    notes += [f"{one.pages_used} of {one.pages} pages"] if one.pages else []
    notes += [f"{one.preemptions} preemptions"] if one.preemptions else []
    notes += [f"{one.watts:.0f} W"] if one.watts is not None else []
    return Text(f"{name}: " + ", ".join(notes), style="dim")


def _model_line(one: ModelFigures) -> Text:
    line = Text.assemble((f"{_clean(one.model)}", "bold"), (f"  {_clean(one.about)}", "dim"))
    if one.tokens_per_currency is not None:
        line.append(f"\n  {one.tokens_per_currency:,.0f} tokens per currency unit, since the start")
    if one.joules_per_token is not None:
        line.append(f"\n  {one.joules_per_token:.3g} J a token, the whole device's, since the start")
    return line


def _tenants(tenants: list[dict[str, Any]]) -> Table:
    table = _table("tenant", "model", "tokens so far", "per currency unit")
    for one in tenants:
        per = one["tokens_per_currency"]
        cells = (
            _clean(one["tenant"]),
            _clean(one["model"]),
            f"{one['tokens']:,}",
            "–" if per is None else f"{per:,.0f}",
        )
        table.add_row(*map(Text, cells))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def number(value: float | None) -> str:
    """Three digits at most; – for what is not known."""
    if value is None:
        return "–"
    if value >= 9999.5:
        return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value / 1e3:.0f}k"
    return f"{value:.0f}" if value >= 99.5 or value == 0 else f"{value:.1f}"


def milliseconds(value_ms: float | None) -> str:
    """With its unit: milliseconds, or seconds from one second on."""
    if value_ms is None:
        return "–"
    if value_ms >= 999.5:
        return f"{value_ms / 1e3:.1f}s"
    return f"{value_ms:.0f}ms" if value_ms >= 9.95 else f"{value_ms:.2f}ms"


def share(value: float | None) -> str:
    """Percent."""
    return "–" if value is None else f"{value:.1%}" if 0 < value < 0.0995 else f"{value:.0%}"


def _short(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _clean(text: str) -> str:
    """Printable only: names come from servers, and a terminal obeys what it is sent."""
    return "".join(char for char in text if char.isprintable())
