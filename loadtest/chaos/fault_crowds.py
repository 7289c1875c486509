"""Owns faults under many clients: a flood, and workers killed while hundreds of streams are open. On threads: they have loops of their own."""

from __future__ import annotations

import asyncio
from typing import Final

from loadtest.bench.chaos import Plan, run_chaos
from loadtest.bench.flood import PROMISED_GOODPUT, PROMISED_REFUSAL_MS, PROMISED_TTFT, measure
from loadtest.chaos.faults import Fault, Found, Size


async def _flood(size: Size) -> list[Found]:
    """As `degas bench flood`, once."""
    factors = tuple(PROMISED_GOODPUT)
    rows = await asyncio.to_thread(
        measure, profile="b200", rows=8, queue=8, tokens=16, seconds=size.seconds, rounds=1, factors=factors
    )
    saturated, *flooded = rows
    found = []
    for row in flooded:
        promised = PROMISED_GOODPUT[row.factor]
        found.append(
            Found(
                f"{row.factor:g}× capacity: goodput ≥ {promised:.0%}, p99 of the first token ≤ {PROMISED_TTFT}×, a refusal ≤ "
                f"{PROMISED_REFUSAL_MS:g} ms with the measured Retry-After",
                f"goodput {row.goodput_ratio:.0%} of {saturated.goodput_per_s:.0f}/s, p99 {row.ttft_p99_ratio:.2f}×, "
                f"{row.refused} refusals of {row.refusal_p99_ms:.1f} ms at p99, {row.failed} failed; client late by "
                f"{row.client_late_p99_ms:.1f} ms",
                bool(row.keeps_promise) and not row.failed,
                row.refusal_p99_ms / 1e3,
                PROMISED_REFUSAL_MS / 1e3,
            )
        )
    return found


async def _killed_under_load(size: Size) -> list[Found]:
    """As `degas bench chaos`, with a kill and a stop."""
    report = await asyncio.to_thread(
        run_chaos, Plan("sim", clients=size.streams, seconds=14.0, kill_every_s=5.0, stops=1)
    )
    facts = report.facts()
    return [
        Found(f"{size.streams} streams: {promise}", facts[promise], kept)
        for promise, kept in report.promises().items()
    ]


FAULTS: Final = [
    Fault("flood", "a flood of 2, 5 and 10 times what can be served", _flood),
    Fault("killed-under-load", "workers killed and stopped under a load of streams", _killed_under_load),
]
