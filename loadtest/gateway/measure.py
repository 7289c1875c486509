"""Owns `degas bench gateway`'s plan: which loads, in turns, medians of them, and the table. The command's main thread."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from loadtest.gateway.stacks import BenchError, Load, Turn, take_turn
from loadtest.tables import Figures

LOADS: Final = (
    Load("sse", 32, 100.0),
    Load("sse", 256, 20.0),
    Load("websocket", 32, 100.0),
    Load("websocket", 256, 20.0),
    Load("http", 16, 500.0),
)
SPARE_FILES: Final = 200
_SPREAD: Final = 20  # of the open streams' tokens over a second, as those of many answers are


@dataclass(frozen=True, slots=True)
class Row:
    """One load: medians over the rounds of Degas's figures and the reference's, where that was measured."""

    load: Load
    turns: list[Turn]
    reference: list[Turn]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        unit = "us_per_request" if self.load.transport == "http" else "us_per_token"
        row: dict[str, Any] = {"transport": self.load.transport}
        if self.load.transport == "http":
            row["connections"] = self.load.streams
        else:
            row |= {"streams": self.load.streams, "rate": self.load.rate}
        row[unit] = _median(self.turns, "us")
        row[f"reference_{unit}"] = _median(self.reference, "us")
        row["ratio"] = round(row[unit] / row[f"reference_{unit}"], 3) if self.reference else None
        if self.load.transport != "http":
            for name in ("p50_ms", "p99_ms"):
                row[f"added_{name}"] = _median(self.turns, name)
                row[f"reference_added_{name}"] = _median(self.reference, name)
        if self.load.groups > 1:
            row["kb_per_stream"] = _median(self.turns, "kb_per_stream")
            row["reference_kb_per_stream"] = _median(self.reference, "kb_per_stream")
        return row


def _median(turns: Sequence[Turn], name: str) -> float | None:
    values = [value for turn in turns if (value := getattr(turn, name)) is not None]
    return round(median(values), 3) if values else None


def check_files(num_streams: int) -> None:
    """Raise this process's limit of open files, which its children inherit, as far as it takes. Raises ValueError."""
    needed = num_streams + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"{num_streams} streams need {needed} open files in each process, and this machine allows {hard}: "
            f"raise the limit (ulimit -Hn, or LimitNOFILE=), or ask for at most {hard - SPARE_FILES}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def measure(
    loads: Sequence[Load],
    *,
    rounds: int,
    seconds: float,
    reference: str | None,
    say: Callable[[str], None],
) -> list[Row]:
    """Every load, `rounds` times, Degas and the reference in turns. Raises ValueError and `BenchError`."""
    if not 1 <= rounds <= 50 or not 0.1 <= seconds <= 120:
        raise ValueError("rounds are 1 to 50, seconds 0.1 to 120")
    check_files(max(load.streams for load in loads))
    rows = []
    for load in loads:
        row = Row(load, [], [])
        for number in range(rounds):
            row.turns.append(take_turn(load, seconds, None))
            if reference is not None:
                row.reference.append(take_turn(load, seconds, reference))
            said = f"{load.transport} {load.streams} × {load.rate:g}/s, round {number + 1}: {row.turns[-1].us:.1f} µs"
            say(said + (f", reference {row.reference[-1].us:.1f} µs" if reference is not None else ""))
        rows.append(row)
    return rows


def open_streams(count: int) -> Load:
    """So many SSE streams at a token a second."""
    if not 1 <= count <= 10_000:
        raise ValueError("open streams are 1 to 10000")
    return Load("sse", count, 1.0, groups=_SPREAD)


def table(rows: Sequence[Row]) -> Figures:
    """A line for each load."""
    names = (
        "load",
        "µs",
        "reference µs",
        "ratio",
        "p99 ms",
        "reference p99 ms",
        "kB a stream",
        "reference kB",
    )
    done = Figures(
        "processor time of the gateway, a streamed token (http: a request of eight tokens); p99: from the engine's send "
        "to the client's receipt, by the machine's one monotonic clock",
        names,
        left=("load",),
        dim=("reference µs", "reference p99 ms", "reference kB"),
    )
    for row in rows:
        load, said = row.load, row.to_json()
        unit = "us_per_request" if load.transport == "http" else "us_per_token"
        what = (
            f"{load.streams} connections" if load.transport == "http" else f"{load.streams} × {load.rate:g}/s"
        )
        done.add(
            f"{load.transport}, {what}",
            *(
                "" if value is None else f"{value:.3g}"
                for value in (
                    said[unit],
                    said[f"reference_{unit}"],
                    said["ratio"],
                    said.get("added_p99_ms"),
                    said.get("reference_added_p99_ms"),
                    said.get("kb_per_stream"),
                    said.get("reference_kb_per_stream"),
                )
            ),
        )
    return done


__all__ = ["LOADS", "BenchError", "Row", "check_files", "measure", "open_streams", "table"]
