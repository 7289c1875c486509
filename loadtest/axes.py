"""Owns plot frames: scales, ticks and the SVG around a plot's marks. Numbers in, SVG text out.

Colours are CSS variables of the page, so that one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

WIDTH: Final = 720
HEIGHT: Final = 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 40

Tick = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to pixels, linearly or by logarithm."""

    low: float
    high: float
    start_px: float
    end_px: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start_px + share * (self.end_px - self.start_px)


def log_ticks(low: float, high: float) -> list[Tick]:
    """Ticks at 1, 2 and 5 of each decade in range, labelled as milliseconds or seconds."""
    ticks: list[Tick] = []
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        ticks += [(step * 10**exponent, label_ms(step * 10**exponent)) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick[0] <= high * 1.0001]
    if len(ticks) <= 9:
        return ticks
    return [(value, label if f"{value:e}".startswith("1.0") else "") for value, label in ticks]


def linear_ticks(high: float, *, num_ticks: int = 6, unit: str = "") -> list[Tick]:
    """Round ticks from 0 to about `high`."""
    if high <= 0:
        return [(0.0, "0")]
    raw = high / num_ticks
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    return [(index * step, f"{index * step:g}{unit}") for index in range(int(high / step * 1.0001) + 1)]


def percentile_ticks(last_nines: float) -> list[Tick]:
    """Ticks of a percentile axis whose values are `nines`: 0.9 is 1, 0.99 is 2."""
    rare = range(1, int(last_nines + 0.001) + 1)
    named = [(float(nines), f"p{100 * (1 - 10.0**-nines):.10g}") for nines in rare]
    return [(0.0, "0"), (math.log10(2), "p50"), *named]


def label_ms(value_ms: float) -> str:
    """`5 ms`, `2 s`, `200 µs`."""
    if value_ms >= 1000:
        return f"{value_ms / 1000:g} s"
    return f"{value_ms:g} ms" if value_ms >= 1 else f"{value_ms * 1000:g} µs"


@dataclass(slots=True)
class Frame:
    """A plot's box: draw grid and axes, then put marks in."""

    title: str  # read out by screen readers
    x: Scale
    y: Scale
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_label: str = ""
    marks: list[str] = field(default_factory=list)

    def line(self, points: Iterable[tuple[float, float]], css: str) -> None:
        """A line through the points."""
        coordinates = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline class="line {css}" points="{coordinates}"/>')

    def area(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """The area between the points and the axis."""
        if not points:
            return
        coordinates = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        first, last = self.x(points[0][0]), self.x(points[-1][0])
        base = self.y.start_px
        self.marks.append(
            f'<polygon class="area {css}" points="{first:.1f},{base:.1f} {coordinates} {last:.1f},{base:.1f}"/>'
        )

    def dots(self, points: Iterable[tuple[float, float]], css: str, radius_px: float = 1.6) -> None:
        """One dot a point, drawn as one path: thousands of circles would be slow to open."""
        step = 2 * radius_px
        path = "".join(
            f"M{self.x(x) - radius_px:.1f} {self.y(y):.1f}a{radius_px} {radius_px} 0 1 0 {step} 0"
            f"a{radius_px} {radius_px} 0 1 0 -{step} 0"
            for x, y in points
        )
        if path:
            self.marks.append(f'<path class="dots {css}" d="{path}"/>')

    def bar(self, x_low: float, x_high: float, y_low: float, y_high: float, css: str, tip: str = "") -> None:
        """A rectangle between two x and two y values."""
        left, right = self.x(x_low), self.x(x_high)
        top, bottom = self.y(y_high), self.y(y_low)
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self.marks.append(
            f'<rect class="bar {css}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.8):.1f}" '
            f'height="{max(bottom - top, 0):.1f}">{inner}</rect>'
        )

    def level(self, y: float, label: str) -> None:
        """A dashed line across at `y`, such as an objective."""
        if self.y.low <= y <= self.y.high:
            at = self.y(y)
            self.marks.append(
                f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text class="level-label" x="{WIDTH - RIGHT - 4}" y="{at - 4:.1f}">{escape(label)}</text>'
            )

    def svg(self) -> str:
        """The whole drawing."""
        grid: list[str] = []
        for value, label in self.y_ticks:
            at = self.y(value)
            grid.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            if label:
                grid.append(
                    f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{at + 4:.1f}">{escape(label)}</text>'
                )
        for value, label in self.x_ticks:
            at = self.x(value)
            grid.append(f'<line class="grid" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="{at:.1f}" x2="{at:.1f}"/>')
            if label:
                grid.append(
                    f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}">{escape(label)}</text>'
                )
        caption = f'<text class="axis" text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}">{escape(self.x_label)}</text>'
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(grid)}{''.join(self.marks)}{caption}</svg>"
        )


def frame(
    title: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    x_ticks: Sequence[Tick] | Callable[[float, float], Sequence[Tick]],
    y_ticks: Sequence[Tick] | Callable[[float, float], Sequence[Tick]],
    log_x: bool = False,
    log_y: bool = False,
    x_label: str = "",
) -> Frame:
    """A frame over the given ranges; ticks are given, or made from the range."""
    return Frame(
        title,
        Scale(*x_range, LEFT, WIDTH - RIGHT, log_x),
        Scale(*y_range, HEIGHT - BOTTOM, TOP, log_y),
        x_ticks(*x_range) if callable(x_ticks) else x_ticks,
        y_ticks(*y_range) if callable(y_ticks) else y_ticks,
        x_label,
    )
