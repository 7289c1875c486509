"""Owns a load test's HTML page: one file, nothing fetched, light and dark. A result in, text out."""

from __future__ import annotations

import json
from html import escape
from typing import Final

from loadtest.client import Result
from loadtest.histogram import Histogram
from loadtest.plots import histogram_plot, percentile_plot, rate_plot, time_plot
from loadtest.report import (
    describe_load,
    describe_slo,
    describe_target,
    error_text,
    figures_of_cost,
    find_warnings,
    format_ms,
    latencies,
    name_of,
    ordered_groups,
    to_json,
)

STYLE: Final = """
:root{color-scheme:light dark;--paper:#faf9f6;--card:#fff;--ink:#1d2126;--soft:#6a717b;--rule:#e4e2dc;
--ttft:#0d8577;--gap:#c2710c;--total:#4658cf;--bad:#cf3a36;--good:#2f9e6b;--slow:#e0ad3c}
@media (prefers-color-scheme:dark){:root{--paper:#12151a;--card:#1a1e25;--ink:#e8eaee;--soft:#959da9;--rule:#2b313b;
--ttft:#3fc7b5;--gap:#f0a24a;--total:#8f9dff;--bad:#ff7b74;--good:#4fc48e;--slow:#e6bd5c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 ui-sans-serif,system-ui,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:26px;letter-spacing:-.02em;margin:0 0 4px;font-weight:650}
h2{font-size:15px;margin:0;font-weight:600}
p.sub,figcaption,.note{color:var(--soft)}
p.sub{margin:0 0 28px}
code{font:13px ui-monospace,Menlo,Consolas,monospace}
.warn{border-left:3px solid var(--slow);background:var(--card);padding:10px 14px;margin:0 0 10px;border-radius:0 8px 8px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;margin:24px 0}
.tile,figure,.sheet{background:var(--card);border:1px solid var(--rule);border-radius:12px}
.tile{padding:14px 16px}
.tile b{display:block;font-size:25px;letter-spacing:-.02em;font-weight:650;font-variant-numeric:tabular-nums}
.tile b small{font-size:14px;font-weight:500;color:var(--soft);margin-left:3px}
.tile span{color:var(--soft);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr));gap:16px;margin:0 0 16px}
figure{margin:0;padding:16px 16px 10px}
figcaption{font-size:13px;margin-bottom:6px}
svg{width:100%;height:auto;display:block;overflow:visible}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;color:var(--soft);margin:2px 0 4px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px;background:var(--c)}
.grid{stroke:var(--rule);stroke-width:1}.tick,.axis,.level-label{fill:var(--soft);font-size:11.5px}
.level{stroke:var(--soft);stroke-dasharray:3 4;stroke-width:1}.level-label{text-anchor:end;font-size:11px}
.line{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.dots{fill:var(--c);opacity:.55}.bar{fill:var(--c);opacity:.8}.bar:hover{opacity:1}
.c-ttft{--c:var(--ttft)}.c-gap{--c:var(--gap)}.c-total{--c:var(--total)}.c-bad{--c:var(--bad);opacity:.95}
.c-good{--c:var(--good)}.c-slow{--c:var(--slow)}.c-arrived{--c:var(--ink);stroke-width:1.4}
.c-flight{--c:var(--total);stroke-dasharray:2 5;stroke-width:1.8}
.sheet{overflow-x:auto;padding:14px 16px;margin-bottom:16px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin-top:8px}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:500;color:var(--soft);font-size:13px}th:first-child,td:first-child{text-align:left;padding-left:0}
tr:last-child td{border-bottom:0}td.said,th.said{text-align:left;white-space:normal}tr.group td{font-weight:600;padding-top:12px}
details{margin-top:20px}summary{cursor:pointer;color:var(--soft)}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px;font-size:12px}
"""

_PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)


def html_report(result: Result) -> str:
    """The page."""
    warnings = "".join(f'<p class="warn">{escape(warning)}</p>' for warning in find_warnings(result))
    latency_legend = (("c-ttft", "first token"), ("c-gap", "gap between pieces"), ("c-total", "whole answer"))
    plots = (
        figure_html("Latency by percentile", "Each step to the right is ten times rarer.", percentile_plot(result),
                latency_legend),
        figure_html("Latency over time", "Each request where it was due to leave.", time_plot(result),
                (latency_legend[0], latency_legend[2], ("c-bad", "failed"))),
        figure_html("Distribution", "Requests by latency.", histogram_plot(result), (latency_legend[0], latency_legend[2])),
        figure_html("Every second", "What ended in it.", rate_plot(result),
                (("c-good", "good"), ("c-slow", "too slow"), ("c-bad", "failed"), ("c-arrived", "arrived"),
                 ("c-flight", "most in flight"))),
    )  # fmt: skip
    body = (
        f"<h1>Load test: {escape(result.scenario.kind)}</h1><p class=sub><code>{escape(result.scenario.url)}</code> · "
        f"{escape(describe_target(result))} · {escape(describe_load(result))}"
        f" · {escape(_when(result))}</p>{warnings}{_tiles(result)}"
        f'<div class="plots">{"".join(plots)}</div>{_latency_sheet(result)}{_rate_sheet(result)}{_error_sheet(result)}'
        f'<p class="note">Latencies count from the moment a request was due, so waiting is in them. '
        f"This client used {result.client_cpu_share:.0%} of a core and sent late by "
        f"{format_ms(result.lateness.percentile_ms(99))} ms at p99.</p>"
        f"<details><summary>The whole result as JSON</summary><pre>{escape(json.dumps(to_json(result), indent=1))}"
        "</pre></details>"
    )
    return page_html(f"Degas load test · {result.started_at}", STYLE, body)


def page_html(title: str, style: str, body: str) -> str:
    """A page in one file that may fetch nothing."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def _when(result: Result) -> str:
    return result.started_at.replace("T", " ").replace("+00:00", " UTC")


def figure_html(title: str, note: str, svg: str, legend: tuple[tuple[str, str], ...]) -> str:
    """A plot with its title and legend; nothing without a plot."""
    if not svg:
        return ""
    items = "".join(f'<span class="{css}"><i></i>{escape(name)}</span>' for css, name in legend)
    return (
        f"<figure><h2>{escape(title)}</h2><figcaption>{escape(note)}</figcaption>"
        f'<div class="legend">{items}</div>{svg}</figure>'
    )


def _tiles(result: Result) -> str:
    tally = result.all
    values = tally.summary(result.elapsed_s)
    tiles = (
        (format_ms(tally.ttft.percentile_ms(50)), "ms", "first token, median"),
        (format_ms(tally.ttft.percentile_ms(99)), "ms", "first token, p99"),
        (format_ms(tally.gap.percentile_ms(50)), "ms", "gap, median"),
        (format_ms(tally.total.percentile_ms(99)), "ms", "whole answer, p99"),
        (f"{values['goodput_rps']:.1f}", "/s", f"good ({values['good_share']:.1%})"),
        (f"{values['tokens_per_s']:,.0f}", "/s", "tokens"),
        (f"{tally.errors.total():,}", f"of {tally.sent:,}", "failed or refused"),
        *figures_of_cost(result),
    )
    cells = (f'<div class="tile"><b>{value}<small>{unit}</small></b><span>{escape(name)}</span></div>'
             for value, unit, name in tiles)  # fmt: skip
    return f'<div class="tiles">{"".join(cells)}</div>'


def _latency_sheet(result: Result) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("count", "p50", "p90", "p99", "p99.9", "max", "mean"))
    rows: list[str] = []
    for name, tally in ordered_groups(result):
        rows.append(f'<tr class="group"><td colspan="8">{escape(name_of(name))}</td></tr>')
        rows += [_latency_row(label, histogram) for label, histogram in latencies(tally) if len(histogram)]
    return (
        f'<div class="sheet"><h2>Latency, ms</h2><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _latency_row(label: str, histogram: Histogram) -> str:
    values = [
        *(histogram.percentile_ms(percentile) for percentile in _PERCENTILES),
        histogram.max_ms,
        histogram.mean_ms,
    ]
    cells = "".join(f"<td>{format_ms(value)}</td>" for value in values)
    return f"<tr><td>{escape(label)}</td><td>{len(histogram):,}</td>{cells}</tr>"


def _rate_sheet(result: Result) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("sent", "ok", "429", "errors", "left", "ok/s", "goodput/s", "tokens/s")
    )
    rows: list[str] = []
    for name, tally in ordered_groups(result):
        values = tally.summary(result.elapsed_s)
        cells = (
            f"{tally.sent:,}", f"{tally.ok:,}", f"{tally.refused:,}", f"{tally.errors.total() - tally.refused:,}", f"{tally.left:,}",
            f"{values['throughput_rps']:.1f}", f"{values['goodput_rps']:.1f}", f"{values['tokens_per_s']:,.0f}",
        )  # fmt: skip
        rows.append(
            f"<tr><td>{escape(name_of(name))}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    return (
        f'<div class="sheet"><h2>Rates</h2><span class="note">good: {escape(describe_slo(result))}</span>'
        f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _error_sheet(result: Result) -> str:
    if not result.all.errors:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(code)}</code></td><td>{count:,}</td>"
        f'<td class="said">{escape(error_text(result.all, code))}</td></tr>'
        for code, count in result.all.errors.most_common()
    )
    heads = "<th>code</th><th>count</th><th class=said>what the first one said</th>"
    return f'<div class="sheet"><h2>Errors by code</h2><table><tr>{heads}</tr>{rows}</table></div>'
