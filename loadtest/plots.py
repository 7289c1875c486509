"""Owns the four plots of a load test's page. A result in, SVG text out."""

from __future__ import annotations

from typing import Final

from loadtest.axes import frame, linear_ticks, log_ticks, percentile_ticks
from loadtest.calls import OK, Tally
from loadtest.client import Result
from loadtest.histogram import Histogram

MAX_DOTS: Final = 4000

TTFT, GAP, TOTAL, FAILED = "c-ttft", "c-gap", "c-total", "c-bad"


def percentile_plot(result: Result) -> str:
    """Latency against percentile, with the tail stretched: each step to the right is ten times rarer."""
    series = _series(result.all)
    if not series:
        return ""
    curves = [(histogram.curve(), css) for histogram, css in series]
    last = max(curve[-1][0] for curve, _ in curves)
    low, high = _range_ms([histogram for histogram, _ in series])
    slo = result.scenario.slo
    high = max(high, *(1.25 * limit for limit in (slo.ttft_ms, slo.total_ms) if limit < 4 * high), high)
    plot = frame(
        "latency by percentile",
        (0.0, last),
        (low, high),
        x_ticks=percentile_ticks(last),
        y_ticks=log_ticks,
        log_y=True,
        x_label="percentile",
    )
    plot.level(slo.ttft_ms, f"first token ≤ {slo.ttft_ms:g} ms")
    plot.level(slo.total_ms, f"total ≤ {slo.total_ms:g} ms")
    for curve, css in curves:
        plot.line([(nines, max(value_ms, 1e-3)) for nines, value_ms in curve], css)
    return plot.svg()


def time_plot(result: Result) -> str:
    """Each request's first token and end over the time it was due; failures are drawn on the axis."""
    points = sorted(result.points, key=lambda point: point.due_s)
    if not points:
        return ""
    points = points[:: max(1, len(points) // MAX_DOTS)]
    ended_well = [point for point in points if point.code == OK]
    values_ms = [value * 1e3 for point in ended_well for value in (point.ttft_s, point.total_s) if value > 0]
    low, high = _padded(min(values_ms, default=1.0) / 1.4, max(values_ms, default=1.0))
    end_s = max(points[-1].due_s, 0.1)
    plot = frame(
        "latency over time",
        (0.0, end_s),
        (low, high),
        x_ticks=linear_ticks(end_s, unit=" s"),
        y_ticks=log_ticks,
        log_y=True,
        x_label="scheduled arrival",
    )
    plot.dots(((point.due_s, point.total_s * 1e3) for point in ended_well), TOTAL)
    plot.dots(((point.due_s, point.ttft_s * 1e3) for point in ended_well if point.ttft_s), TTFT)
    plot.dots(((point.due_s, low) for point in points if point.code != OK), FAILED, 2.4)
    return plot.svg()


def histogram_plot(result: Result) -> str:
    """How many requests took how long."""
    series = [(histogram, css) for histogram, css in _series(result.all) if css != GAP]
    if not series:
        return ""
    buckets = [(histogram.buckets(), css) for histogram, css in series]
    low = min(found[0].low_ms for found, _ in buckets)
    high = max(found[-1].high_ms for found, _ in buckets)
    most = max(bucket.count for found, _ in buckets for bucket in found)
    plot = frame(
        "distribution of latencies",
        (low, high),
        (0.0, most * 1.05),
        x_ticks=log_ticks,
        y_ticks=linear_ticks(most * 1.05, num_ticks=5),
        log_x=True,
        x_label="latency",
    )
    for found, css in reversed(buckets):
        for bucket in found:
            if bucket.count:
                tip = f"{bucket.count} between {bucket.low_ms:.2f} and {bucket.high_ms:.2f} ms"
                plot.bar(bucket.low_ms, bucket.high_ms, 0, bucket.count, css, tip)
    return plot.svg()


def rate_plot(result: Result) -> str:
    """What ended in each second, good over slow over failed, with arrivals and requests in flight as lines."""
    seconds = result.seconds
    if not seconds:
        return ""
    most = max(max(second.ok + second.failed, second.arrived, second.in_flight) for second in seconds)
    high = max(most, 1) * 1.08
    plot = frame(
        "requests ended in each second",
        (0.0, float(len(seconds))),
        (0.0, high),
        x_ticks=linear_ticks(float(len(seconds)), unit=" s"),
        y_ticks=linear_ticks(high, num_ticks=5),
        x_label="time",
    )
    for index, second in enumerate(seconds):
        tip = f"second {index}: {second.good} good, {second.ok - second.good} slow, {second.failed} failed"
        plot.bar(index, index + 1, 0, second.good, "c-good", tip)
        plot.bar(index, index + 1, second.good, second.ok, "c-slow", tip)
        plot.bar(index, index + 1, second.ok, second.ok + second.failed, FAILED, tip)
    plot.line([(index + 0.5, float(second.arrived)) for index, second in enumerate(seconds)], "c-arrived")
    plot.line([(index + 0.5, float(second.in_flight)) for index, second in enumerate(seconds)], "c-flight")
    return plot.svg()


def _series(tally: Tally) -> list[tuple[Histogram, str]]:
    all_series = ((tally.ttft, TTFT), (tally.gap, GAP), (tally.total, TOTAL))
    return [(histogram, css) for histogram, css in all_series if len(histogram)]


def _range_ms(histograms: list[Histogram]) -> tuple[float, float]:
    return _padded(
        min(max(histogram.min_ms, histogram.percentile_ms(1)) for histogram in histograms),
        max(histogram.max_ms for histogram in histograms),
    )


def _padded(low_ms: float, high_ms: float) -> tuple[float, float]:
    low_ms = max(low_ms, 0.01)
    return low_ms / 1.25, max(high_ms, low_ms) * 1.25
