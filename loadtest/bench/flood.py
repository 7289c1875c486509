"""Owns `degas bench flood`: what a gateway does with far more requests than it can serve. Runs in the main thread.

A closed loop that fills rows and queue finds the saturated rate; then an open loop of short streamed requests arrives
at multiples of it. The gateway and the worker are real processes; the device is simulated.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

from loadtest.bench.flood_client import WARM_UP_S, Flood, Phase
from loadtest.bench.processes import gateway_and_worker, serving
from loadtest.histogram import Histogram
from loadtest.tables import Figures

FACTORS: Final = (1.0, 2.0, 5.0, 10.0)
PROMISED_GOODPUT: Final = {2.0: 0.95, 5.0: 0.90, 10.0: 0.85}  # of the saturated rate
PROMISED_TTFT: Final = 1.5  # times the saturated p99
PROMISED_REFUSAL_MS: Final = 20.0  # p99
LATE_MS: Final = 5.0  # if the client's own p99 lateness is above this, its figures are spoiled
RETRY_FLOOR_S: Final = 0.1  # the gateway names no shorter time
RETRY_FALLBACK_S: Final = 1.0  # the time the gateway names while it knows no rate

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FloodRow:
    """One multiple of the saturated rate over all rounds; ratios are medians of each round's own."""

    factor: float
    sent_per_s: float
    goodput_per_s: float
    goodput_ratio: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    ttft_p99_ratio: float
    refused: int
    failed: int
    refusal_p50_ms: float
    refusal_p99_ms: float
    all_say_retry_after: bool
    retry_after_ms: tuple[float, float]  # smallest and largest
    retry_from_drain_rate_pct: float
    client_late_p99_ms: float
    client_cpu_pct: float
    gateway_cpu_pct: float
    refusal_cpu_us: (
        float  # the gateway's CPU time a refusal, beyond that of the answers; 0 where refusals are few
    )
    keeps_promise: bool | None  # None: nothing is promised for this multiple

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(self).items()}


def measure(
    *,
    profile: str,
    rows: int,
    queue: int,
    tokens: int,
    seconds: float,
    rounds: int,
    factors: tuple[float, ...],
) -> list[FloodRow]:
    """The closed loop (factor 0), then each multiple of what it found; `rounds` times in turn."""
    # A row is free only one step after its stream has ended; with a queue this long the gateway refuses, not the worker.
    sizes = f"--max-rows {rows} --max-waiting {rows + queue}"
    flags = f"--device sim --sim-profile {profile} {sizes}".split()
    phases: list[list[Phase]] = []
    with serving(flags, gateway_settings={"DEGAS_GATEWAY_MAX_QUEUE": str(queue)}) as (url, probe):
        gateway_pid, _ = gateway_and_worker()
        for turn in range(rounds):
            done: list[Phase] = []
            for factor in (0.0, *factors):
                flood = Flood(url, tokens, seed=turn)
                before_s = cpu_s(gateway_pid)
                if factor == 0.0:
                    phase = on_loop(flood.saturate(rows + queue, seconds))
                else:
                    phase = on_loop(flood.arrive(factor, done[0].goodput * factor, seconds))
                phase.gateway_cpu_s = cpu_s(gateway_pid) - before_s
                phase.drain_rate = probe.beat().drain_rate
                done.append(phase)
                if not done[0].finished:
                    raise RuntimeError("the closed loop finished nothing: there is no rate to multiply")
            phases.append(done)
    return [
        row_of([done[i] for done in phases], [done[0] for done in phases]) for i in range(len(factors) + 1)
    ]


def flood_table(done: list[FloodRow], title: str) -> Figures:
    """The rows as a table, the closed loop first."""
    table = Figures(
        f"flood: {title}, simulated device in real time",
        (
            "load",
            "sent/s",
            "goodput/s",
            "of saturated",
            "ttft p50 / p99 ms",
            "p99 of saturated",
            "refused",
            "refusal p50 / p99 ms",
            "retry-after ms",
            "from drain rate",
            "client late p99 ms",
            "cpu client / gateway",
            "gateway µs a refusal",
            "promise",
        ),
    )
    for row in done:
        refused = row.refused > 0
        table.add(
            f"{row.factor:g}×" if row.factor else "closed loop",
            f"{row.sent_per_s:.0f}",
            f"{row.goodput_per_s:.1f}",
            f"{100 * row.goodput_ratio:.1f}%",
            f"{row.ttft_p50_ms:.1f} / {row.ttft_p99_ms:.1f}",
            f"{row.ttft_p99_ratio:.2f}×",
            f"{row.refused}" + (f", {row.failed} failed" if row.failed else ""),
            f"{row.refusal_p50_ms:.1f} / {row.refusal_p99_ms:.1f}" if refused else "",
            "{:.0f}–{:.0f}".format(*row.retry_after_ms)
            + ("" if row.all_say_retry_after else ", some without")
            if refused
            else "",
            f"{row.retry_from_drain_rate_pct:.0f}%" if refused else "",
            f"{row.client_late_p99_ms:.1f}",
            f"{row.client_cpu_pct:.0f}% / {row.gateway_cpu_pct:.0f}%",
            f"{row.refusal_cpu_us:.0f}" if row.refusal_cpu_us else "",
            _verdict(row),
        )
    return table


def _verdict(row: FloodRow) -> str:
    """Whether the promise was kept; a client that could not send in time has spoiled its own figures."""
    if row.keeps_promise is None:
        return ""
    if row.keeps_promise:
        return "kept"
    return "missed" if row.client_late_p99_ms <= LATE_MS else "missed; client late"


def on_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it on the quickest event loop there is."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def row_of(phases: list[Phase], saturated: list[Phase]) -> FloodRow:
    """One multiple's phases, a round each, beside the closed loops of the same rounds."""
    ttft, refusal, lateness = Histogram(), Histogram(), Histogram()
    for phase in phases:
        ttft.add(phase.ttft)
        refusal.add(phase.refusal)
        lateness.add(phase.lateness)
    pairs = list(zip(phases, saturated, strict=True))
    goodput_ratio = median(phase.goodput / base.goodput for phase, base in pairs)
    ttft_ratio = median(phase.ttft.percentile_ms(99) / base.ttft.percentile_ms(99) for phase, base in pairs)
    refused, finished = sum(phase.refused for phase in phases), sum(phase.finished for phase in phases)
    extra_cpu_s = sum(
        phase.gateway_cpu_s - base.gateway_cpu_s * phase.finished / base.finished for phase, base in pairs
    )
    waits = [wait_s for phase in phases for wait_s in phase.retry_after_s]
    measured = sum(_is_measured(wait_s, phase) for phase in phases for wait_s in phase.retry_after_s)
    factor, seconds = phases[0].factor, sum(phase.seconds for phase in phases)
    wall_s = seconds + WARM_UP_S * len(phases)
    all_say = not any(phase.without_retry_after for phase in phases)
    keeps = None
    if factor in PROMISED_GOODPUT:
        keeps = (
            goodput_ratio >= PROMISED_GOODPUT[factor]
            and ttft_ratio <= PROMISED_TTFT
            and refusal.percentile_ms(99) <= PROMISED_REFUSAL_MS
            and all_say
            and measured == len(waits)
        )
    return FloodRow(
        factor=factor,
        sent_per_s=sum(phase.sent for phase in phases) / seconds,
        goodput_per_s=finished / seconds,
        goodput_ratio=goodput_ratio,
        ttft_p50_ms=ttft.percentile_ms(50),
        ttft_p99_ms=ttft.percentile_ms(99),
        ttft_p99_ratio=ttft_ratio,
        refused=refused,
        failed=sum(phase.failed for phase in phases),
        refusal_p50_ms=refusal.percentile_ms(50),
        refusal_p99_ms=refusal.percentile_ms(99),
        all_say_retry_after=all_say,
        retry_after_ms=(min(waits) * 1e3, max(waits) * 1e3) if waits else (0.0, 0.0),
        retry_from_drain_rate_pct=100 * measured / len(waits) if waits else 0.0,
        client_late_p99_ms=lateness.percentile_ms(99),
        client_cpu_pct=100 * sum(phase.client_cpu_s for phase in phases) / wall_s,
        gateway_cpu_pct=100 * sum(phase.gateway_cpu_s for phase in phases) / wall_s,
        refusal_cpu_us=max(0.0, extra_cpu_s) / refused * 1e6 if refused > finished else 0.0,
        keeps_promise=keeps,
    )


def _is_measured(wait_s: float, phase: Phase) -> bool:
    """Whether a refusal's time is what the drain rate says, give or take half, and not the fallback.

    The rate is the worker's at the phase's end; the gateway names no time below its floor.
    """
    if phase.drain_rate <= 0:
        return False
    expected_s = max(RETRY_FLOOR_S, 1 / phase.drain_rate)
    return wait_s != RETRY_FALLBACK_S and expected_s / 1.5 <= wait_s <= expected_s * 1.5


def cpu_s(pid: int) -> float:
    """Processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
