"""Owns the tables of `degas bench`'s smaller commands. Runs wherever they are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loadtest.tables import Figures, flatten

if TYPE_CHECKING:
    from loadtest.bench.first_token import FirstToken
    from loadtest.bench.loop import LoopRow
    from loadtest.bench.structured import Share


def loop_table(done: Sequence[LoopRow], profile: str) -> Figures:
    """Blocking beside pipelined, and beside what is published for the same device and rows."""
    from loadtest.bench.published import PHOTON

    table = Figures(
        f"decode step, milliseconds ({profile}, simulated device in real time, SSE clients)",
        (
            "rows",
            "forward",
            "sample",
            "blocking",
            "pipelined",
            "host µs",
            "bubble",
            "busy",
            "gain",
            "events/s",
            "published: pipelined",
            "published: blocking",
            "published: gain",
        ),
        dim=("published: pipelined", "published: blocking", "published: gain"),
    )
    for row in done:
        known = PHOTON.get((profile, row.rows))
        table.add(
            str(row.rows),
            f"{row.forward_ms:.2f}",
            f"{row.sample_ms:.2f}",
            f"{row.blocking_ms:.3f}",
            f"{row.pipelined_ms:.3f}",
            f"{row.host_us:.0f}",
            f"{row.bubble_ms:.3f}",
            f"{row.busy_pct:.1f}%",
            f"{row.gain_pct:.1f}%",
            f"{row.tokens_per_s:.0f}",
            *((f"{known.pipelined_ms}", f"{known.blocking_ms}", f"{known.gain_pct}%") if known else [""] * 3),
        )
    return table


def first_token_table(done: Sequence[FirstToken], rows: int, profile: str) -> Figures:
    """A line for each mode."""
    title = f"time to first token behind {rows} streams ({profile}, simulated device in real time)"
    table = Figures(title, ("mode", "p50 ms", "p90 ms", "step ms"))
    for mode in done:
        table.add(mode.mode, f"{mode.p50_ms:.2f}", f"{mode.p90_ms:.2f}", f"{mode.step_ms:.3f}")
    return table


def decode_table(done: Sequence[dict[str, Any]], dtype: str) -> Figures:
    """Our rate beside transformers' for each number of rows."""
    names = ("rows", "degas", "transformers", "ratio", "ratio by CPU time")
    table = Figures(f"decode tokens/s, one compute thread, {dtype}", names)
    for row in done:
        table.add(
            str(row["rows"]),
            f"{row['degas_tokens_per_s']:.0f}",
            f"{row['transformers_tokens_per_s']:.0f}",
            f"{row['ratio']:.2f}×",
            f"{row['cpu_ratio']:.2f}×",
        )
    return table


def accuracy_table(result: Mapping[str, Any]) -> Figures:
    """A line for each figure."""
    table = Figures("accuracy on scenes never seen", ("figure", "value"), left=("figure",))
    for name, value in flatten(result):
        table.add(name, value)
    return table


def structured_table(done: Sequence[Share], rows: int, profile: str) -> Figures:
    """A line for each share of constrained requests and each place that enforces them."""
    table = Figures(
        f"throughput with constrained requests, {rows} streams ({profile}, simulated device)",
        ("structured", "enforced by", "tokens/s", "relative", "zombie rows"),
    )
    for share in done:
        table.add(
            f"{share.structured_pct}%",
            share.where,
            f"{share.tokens_per_s:.0f}",
            f"{share.relative:.3f}×",
            f"{share.zombie_pct:.1f}%",
        )
    return table
