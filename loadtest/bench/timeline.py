"""Owns the picture of two recordings, blocking above pipelined, as a self-contained SVG."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

LANES = {1: "host", 2: "device", 3: "copy"}
WIDTH, LEFT, LANE_PX, GAP_PX = 960, 150, 30, 34
SHOWN_STEPS = 5

STYLE = """
  text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #23262b }
  .small { font-size: 11px; fill: #6b6f76 } .title { font-size: 15px; font-weight: 600 }
  .inside { font-size: 11px; fill: #fff } .lane { stroke: #d9d4c7 }
  .device { fill: #2b5870 } .bubble { fill: #c4604a } .host { fill: #5f958b } .wait { fill: #e4dfd2 } .copy { fill: #d3a04a }
  @media (prefers-color-scheme: dark) {
    text { fill: #ece7da } .small { fill: #9a9ea6 } .lane { stroke: #343a44 } .wait { fill: #2b313a }
    .device { fill: #4d8aa8 } .inside { fill: #fff }
  }
"""


@dataclass(frozen=True, slots=True)
class Recording:
    """One run's trace and what it is called."""

    title: str
    trace: dict[str, Any]

    @classmethod
    def parse(cls, title: str, data: bytes) -> Recording:
        """From the bytes of a Chrome trace."""
        return cls(title, json.loads(data))

    def spans(self, start_us: float, length_us: float) -> list[dict[str, Any]]:
        """The bars that touch a window."""
        bars = [event for event in self.trace["traceEvents"] if event["ph"] == "X"]
        return [bar for bar in bars if bar["ts"] < start_us + length_us and bar["ts"] + bar["dur"] > start_us]

    def window(self) -> tuple[float, float]:
        """Start and length in µs of a stretch of steps from the recording's middle."""
        steps = [
            e for e in self.trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 2 and e["name"] != "bubble"
        ]
        middle = steps[len(steps) // 2 : len(steps) // 2 + SHOWN_STEPS]
        return middle[0]["ts"], middle[-1]["ts"] + middle[-1]["dur"] - middle[0]["ts"]


def draw(recordings: list[Recording], caption: str) -> str:
    """All recordings under each other on one time scale."""
    length_us = max(recording.window()[1] for recording in recordings) * 1.02
    scale = (WIDTH - LEFT - 20) / length_us
    parts: list[str] = []
    y = 26.0
    for recording in recordings:
        start_us, _ = recording.window()
        parts.append(f'<text class="title" x="16" y="{y}">{recording.title}</text>')
        y += 14
        for lane, name in LANES.items():
            middle = y + LANE_PX / 2
            parts.append(f'<text x="30" y="{middle + 4}">{name}</text>')
            parts.append(
                f'<line class="lane" x1="{LEFT}" x2="{WIDTH - 20}" y1="{y + LANE_PX}" y2="{y + LANE_PX}"/>'
            )
            bars = [bar for bar in recording.spans(start_us, length_us) if bar["tid"] == lane]
            parts += [_bar(bar, LEFT + (bar["ts"] - start_us) * scale, y, scale) for bar in bars]
            y += LANE_PX + 4
        y += GAP_PX
    height = y + 4
    parts.append(f'<text class="small" x="16" y="{height - 10}">{caption}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{caption}">\n<style>{STYLE}</style>\n'
        f'<clipPath id="lanes"><rect x="{LEFT}" y="0" width="{WIDTH - LEFT - 20}" height="{height:.0f}"/></clipPath>\n'
        f"{body}\n</svg>\n"
    )


def _bar(bar: dict[str, Any], x: float, y: float, scale: float) -> str:
    name, width = str(bar["name"]), max(1.0, bar["dur"] * scale)
    kind = (
        "wait"
        if name == "wait"
        else "bubble"
        if name == "bubble"
        else {1: "host", 2: "device", 3: "copy"}[bar["tid"]]
    )
    text = ""
    label = name if bar["tid"] == 2 else ""
    if label and width > 8 * len(label):
        text = f'<text class="inside" x="{x + 6:.1f}" y="{y + LANE_PX / 2 + 4:.1f}">{label}</text>'
    title = f"<title>{name}: {bar['dur']:.0f} µs</title>"
    rect = f'<rect class="{kind}" x="{x:.1f}" y="{y + 3:.1f}" width="{width:.1f}" height="{LANE_PX - 6}" rx="3">{title}</rect>'
    return f'<g clip-path="url(#lanes)">{rect}{text}</g>'
