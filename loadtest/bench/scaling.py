"""Owns `degas bench scaling`: what several workers serve beside one, and what several gateways do with a flood. Main thread.

A fleet of one worker and a fleet of several run side by side, and each is saturated in turn while the other idles. The
device is simulated: a step costs time and no processor, so that a few cores carry several workers as long as the
gateways' processor time allows. Then the larger fleet gets an open loop at multiples of what it was found to serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

from loadtest.bench.flood import FloodRow, cpu_s, on_loop, row_of
from loadtest.bench.flood_client import Flood, Phase
from loadtest.bench.processes import WorkerProbe
from loadtest.fleet import Fleet, fleet
from loadtest.tables import Figures

PROMISED_SHARE: Final = 2.9 / 3
"""Of a worker's own rate, what each of several serves: three serve at least 2.9 times what one does."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured."""

    workers: int = 3
    gateways: int = 2
    rows: int = 8
    queue: int = 8
    tokens: int = 16
    profile: str = "rtx3090"
    seconds: float = 4.0
    rounds: int = 3
    factors: tuple[float, ...] = (2.0, 5.0, 10.0)

    def check(self) -> None:
        """Raises ValueError, naming the field and a value that would work."""
        bounds = {
            "workers": (2, 64, 3),
            "gateways": (1, 16, 2),
            "rows": (1, 1024, 8),
            "queue": (2, 4096, 8),
            "tokens": (1, 4096, 16),
            "seconds": (0.2, 600, 4),
            "rounds": (1, 100, 3),
        }
        for name, (low, high, safe) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value:g}; {low:g} to {high:g} would work, such as {safe}")
        if not all(0 < factor <= 100 for factor in self.factors):
            raise ValueError("factors must lie between 0 and 100; 2,5,10 would work")


@dataclass(frozen=True, slots=True)
class ScalingReport:
    """Rates are medians over the rounds, ratios medians of each round's own."""

    size: Size
    one_per_s: float
    many_per_s: float
    ratio: float
    failed: int  # of both closed loops
    gateway_cpu_pct: float  # of one core, the busiest of the many fleet's gateways
    client_cpu_pct: float
    rows: list[FloodRow]

    @property
    def promised(self) -> float:
        """The ratio that this many workers should reach."""
        return PROMISED_SHARE * self.size.workers

    @property
    def is_kept(self) -> bool:
        """Whether workers add up, no request failed, and every multiple's promise was kept."""
        flooded = all(row.keeps_promise is not False and not row.failed for row in self.rows)
        return self.ratio >= self.promised and not self.failed and flooded

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            **{name: value for name, value in asdict(self).items() if name != "rows"},
            "promised": round(self.promised, 3),
            "is_kept": self.is_kept,
            "rows": [row.to_json() for row in self.rows],
        }

    def table(self) -> Figures:
        """One beside several."""
        size = self.size
        table = Figures(
            f"scaling: {size.workers} workers and {size.gateways} gateways beside one of each; {size.rows} rows, answers of "
            f"{size.tokens} tokens, {size.profile} step times",
            ("workers", "requests/s", "× one", "promised", "failed", "busiest gateway", "client", "kept"),
        )
        table.add("1", f"{self.one_per_s:.1f}", "1.00×", "", "", "", "", "")
        table.add(
            str(size.workers),
            f"{self.many_per_s:.1f}",
            f"{self.ratio:.2f}×",
            f"≥ {self.promised:.2f}×",
            str(self.failed),
            f"{self.gateway_cpu_pct:.0f}%",
            f"{self.client_cpu_pct:.0f}%",
            "yes" if self.ratio >= self.promised and not self.failed else "NO",
        )
        return table


def measure(size: Size) -> ScalingReport:
    """Saturate both fleets in turn, then flood the larger one. Raises ValueError for a size that cannot be run."""
    size.check()
    ones: list[Phase] = []
    manys: list[Phase] = []
    shares: list[float] = []
    floods: list[list[Phase]] = []
    with fleet(_flags(size), gateway_settings=_settings(size)) as one, many(size) as (running, probes):
        for turn in range(size.rounds):
            ones.append(saturate(one, size, turn))
            before_s = [cpu_s(gateway.pid) for gateway in running.gateways]
            manys.append(saturate(running, size, turn))
            after_s = [cpu_s(gateway.pid) for gateway in running.gateways]
            shares.append(max(b - a for a, b in zip(before_s, after_s, strict=True)) / size.seconds)
            floods.append(
                [flood(running, size, turn, factor, manys[-1].goodput, probes) for factor in size.factors]
            )
    return ScalingReport(
        size=size,
        one_per_s=median(phase.goodput for phase in ones),
        many_per_s=median(phase.goodput for phase in manys),
        ratio=median(b.goodput / a.goodput for a, b in zip(ones, manys, strict=True)),
        failed=sum(phase.failed for phase in (*ones, *manys)),
        gateway_cpu_pct=100 * median(shares),
        client_cpu_pct=100 * median(phase.client_cpu_s for phase in manys) / size.seconds,
        rows=[row_of([done[i] for done in floods], manys) for i in range(len(size.factors))],
    )


def _flags(size: Size) -> list[str]:
    flags = f"--model sim --device sim --sim-profile {size.profile} --max-rows {size.rows}".split()
    return [*flags, "--max-waiting", str(size.rows + size.queue)]


def _settings(size: Size) -> dict[str, str]:
    return {"max_queue": str(size.queue)}


@contextmanager
def many(size: Size) -> Iterator[tuple[Fleet, list[WorkerProbe]]]:
    """The larger fleet, and a probe of each of its workers."""
    with fleet(
        _flags(size), num_workers=size.workers, num_gateways=size.gateways, gateway_settings=_settings(size)
    ) as running:
        probes: list[WorkerProbe] = []
        try:
            probes += [WorkerProbe(worker.address, [worker.watched]) for worker in running.workers]
            yield running, probes
        finally:
            for probe in probes:
                probe.close()


def merge(phases: Sequence[Phase]) -> Phase:
    """Several clients' counts of one stretch, as if they were one client's; their processor time is the process' own."""
    whole = Phase(phases[0].factor, phases[0].seconds)
    for phase in phases:
        for name in ("sent", "finished", "refused", "failed", "without_retry_after"):
            setattr(whole, name, getattr(whole, name) + getattr(phase, name))
        whole.retry_after_s += phase.retry_after_s
        whole.ttft.add(phase.ttft)
        whole.refusal.add(phase.refusal)
        whole.lateness.add(phase.lateness)
    whole.client_cpu_s = max(phase.client_cpu_s for phase in phases)
    return whole


def saturate(running: Fleet, size: Size, turn: int) -> Phase:
    """As many under way as there are places."""
    places = len(running.workers) * (size.rows + size.queue)
    each = max(1, places // len(running.gateways))
    phase = _together(running, size, turn, lambda client: client.saturate(each, size.seconds))
    if not phase.finished:
        raise RuntimeError("the closed loop finished nothing: there is no rate to compare")
    return phase


def flood(
    running: Fleet, size: Size, turn: int, factor: float, saturated: float, probes: Sequence[WorkerProbe]
) -> Phase:
    """Arrivals at a multiple of the saturated rate, spread evenly over the gateways."""
    rate = saturated * factor / len(running.gateways)
    before_s = sum(cpu_s(gateway.pid) for gateway in running.gateways)
    phase = _together(running, size, turn, lambda client: client.arrive(factor, rate, size.seconds))
    phase.gateway_cpu_s = sum(cpu_s(gateway.pid) for gateway in running.gateways) - before_s
    phase.drain_rate = min(probe.beat().drain_rate for probe in probes)
    return phase


def _together(
    running: Fleet, size: Size, turn: int, act: Callable[[Flood], Coroutine[Any, Any, Phase]]
) -> Phase:
    """One client for each gateway, all at once in this process."""

    async def both() -> list[Phase]:
        floods = [
            Flood(url, size.tokens, seed=turn * len(running.urls) + number)
            for number, url in enumerate(running.urls)
        ]
        return await asyncio.gather(*map(act, floods))

    return merge(on_loop(both()))
