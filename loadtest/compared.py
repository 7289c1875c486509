"""Owns the comparison of two runs' reports: a table, and a page with both curves of each latency. JSON in, text out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from loadtest.axes import frame, log_ticks, percentile_ticks
from loadtest.histogram import Histogram
from loadtest.page import STYLE, figure_html, page_html
from loadtest.report import SCHEMA, format_ms
from loadtest.tables import Figures

LATENCIES: Final = (
    ("ttft_ms", "first token"),
    ("gap_ms", "gap"),
    ("total_ms", "total"),
    ("refusal_ms", "failed or refused"),
)
_PERCENTILES: Final = ("p50", "p90", "p99", "p99.9", "max")
_RATES: Final = (
    ("throughput_rps", "ok/s"),
    ("goodput_rps", "good/s"),
    ("tokens_per_s", "tokens/s"),
    ("good_share", "share good"),
    ("tokens_per_currency", "tokens per currency unit"),
    ("joules_per_token", "joules a token"),
)
_SAME: Final = 0.02
"""Changes within this share are shown as none: two runs of one server differ by as much."""


@dataclass(frozen=True, slots=True)
class Report:
    """One run as its JSON has it."""

    name: str
    data: dict[str, Any]
    histograms: dict[str, Histogram]

    @property
    def all(self) -> dict[str, Any]:
        """The figures of every request."""
        return dict(self.data["all"])

    def rate(self, name: str) -> float | None:
        """A figure of the whole run; None where it has none."""
        value = self.all.get(name, self.data.get("costs", {}).get(name))
        return float(value) if isinstance(value, (int, float)) else None


def read_report(path: Path) -> Report:
    """Read what `degas loadtest … --json` wrote. Raises `OSError`, or `ValueError` that names the file."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("all"), dict):
        raise ValueError(
            f"{path} is no report of a load test ({SCHEMA}); `degas loadtest … --json FILE` writes one"
        )
    try:
        histograms = {name: Histogram.from_summary(data["all"][name]) for name, _ in LATENCIES}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: all: {error}") from None
    return Report(path.name, data, histograms)


def compared_table(first: Report, second: Report) -> RenderableType:
    """Both runs for the terminal."""
    table = Figures("latency, ms", ("", *_heads(first, second)), left=("",))
    for row in _latency_rows(first, second):
        table.add(*row)
    rates = Figures("rates", ("", *_heads(first, second)), left=("",))
    for row in _rate_rows(first, second):
        rates.add(*row)
    errors = _error_rows(first, second)
    parts: list[RenderableType] = [*(Text(line, style="dim") for line in _about(first, second)), table, rates]
    if errors:
        failed = Figures("errors by code", ("", *_heads(first, second)), left=("",))
        for row in errors:
            failed.add(*row)
        parts.append(failed)
    parts += [Text(f"! {warning}", style="yellow") for warning in differences(first, second)]
    return Group(*parts)


def differences(first: Report, second: Report) -> list[str]:
    """What was not the same in the two loads, so that nobody compares apples with pears."""
    found: list[str] = []
    a, b = first.data.get("scenario", {}), second.data.get("scenario", {})
    found += [
        f"{name} differs: {a.get(name)!r} and {b.get(name)!r}"
        for name in sorted({*a, *b} - {"url", "target", "price_per_hour", "shard", "salt"})
        if a.get(name) != b.get(name)
    ]
    if first.data.get("host") != second.data.get("host"):
        found.append("the clients' machines differ")
    for report in (first, second):
        found += [f"{report.name}: {warning}" for warning in report.data.get("warnings", [])]
    return found


def compared_page(first: Report, second: Report) -> str:
    """One file that fetches nothing: curves of both runs, tables, what differed."""
    legend = (("c-total", first.name), ("c-gap", second.name))
    plots = "".join(
        figure_html(f"{title.capitalize()} by percentile", "Each step to the right is ten times rarer.",
                    _curves(first.histograms[name], second.histograms[name], title), legend)
        for name, title in LATENCIES
    )  # fmt: skip
    heads = "".join(f"<th>{escape(head)}</th>" for head in ("", *_heads(first, second)))
    sheets = "".join(
        _sheet(title, heads, rows)
        for title, rows in (
            ("Latency, ms", _latency_rows(first, second)),
            ("Rates", _rate_rows(first, second)),
            ("Errors by code", _error_rows(first, second)),
        )
        if rows
    )
    warnings = "".join(f'<p class="warn">{escape(line)}</p>' for line in differences(first, second))
    about = "<br>".join(escape(line) for line in _about(first, second))
    body = (
        f'<h1>Two load tests</h1><p class="sub">{about}</p>{warnings}<div class="plots">{plots}</div>{sheets}'
    )
    return page_html("Degas load tests compared", STYLE, body)


def _heads(first: Report, second: Report) -> tuple[str, str, str]:
    names = (first.name, second.name) if first.name != second.name else ("first", "second")
    return (*names, "change")


def _about(first: Report, second: Report) -> list[str]:
    lines: list[str] = []
    for report in (first, second):
        scenario = report.data.get("scenario", {})
        parts = (report.name, scenario.get("kind", "short"), scenario.get("model"), scenario.get("url"),
                 report.data.get("started_at"), f"{report.all.get('sent')} sent, {report.all.get('ok')} ok")  # fmt: skip
        lines.append(" · ".join(str(part) for part in parts if part))
    return lines


def _latency_rows(first: Report, second: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, title in LATENCIES:
        a, b = first.all.get(name, {}), second.all.get(name, {})
        if not a.get("count") and not b.get("count"):
            continue
        for percentile in _PERCENTILES:
            x = float(a[percentile]) if a.get("count") else None
            y = float(b[percentile]) if b.get("count") else None
            shown = [format_ms(value) if value is not None else "–" for value in (x, y)]
            rows.append((f"{title} {percentile}", *shown, _change(x, y)))
    return rows


def _rate_rows(first: Report, second: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, title in _RATES:
        x, y = first.rate(name), second.rate(name)
        if x is not None or y is not None:
            shown = [f"{value:,.4g}" if value is not None else "–" for value in (x, y)]
            rows.append((title, *shown, _change(x, y)))
    return rows


def _error_rows(first: Report, second: Report) -> list[tuple[str, ...]]:
    a, b = first.all.get("errors", {}), second.all.get("errors", {})
    return [
        (code, str(a.get(code, 0)), str(b.get(code, 0)), f"{b.get(code, 0) - a.get(code, 0):+d}")
        for code in sorted({*a, *b})
    ]


def _change(x: float | None, y: float | None) -> str:
    if x is None or y is None or not x:
        return "–"
    return "=" if abs(y / x - 1) < _SAME else f"{y / x - 1:+.0%}"


def _sheet(title: str, heads: str, rows: list[tuple[str, ...]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="sheet"><h2>{escape(title)}</h2><table><tr>{heads}</tr>{lines}</table></div>'


def _curves(a: Histogram, b: Histogram, title: str) -> str:
    both = [histogram for histogram in (a, b) if len(histogram)]
    if not both:
        return ""
    last = max(histogram.curve()[-1][0] for histogram in both)
    low = max(0.01, min(max(histogram.min_ms, histogram.percentile_ms(1)) for histogram in both)) / 1.25
    high = max(low * 2, max(histogram.max_ms for histogram in both) * 1.25)
    plot = frame(
        f"{title} by percentile",
        (0.0, last),
        (low, high),
        x_ticks=percentile_ticks(last),
        y_ticks=log_ticks,
        log_y=True,
        x_label="percentile",
    )
    for histogram, css in ((a, "c-total"), (b, "c-gap")):
        if len(histogram):
            plot.line([(nines, max(value_ms, low)) for nines, value_ms in histogram.curve()], css)
    return plot.svg()
