"""Owns `degas bench ttft`: does overlap cost time to first token? Blocking, pipelined, and pipelined with late launch.

A simulated GPU in real time decodes background streams while single requests arrive at random moments; the client times
their first token. The three modes take turns. Runs in the main thread.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from loadtest.bench.loop import post_completion, read_stream
from loadtest.bench.processes import serving

MODES = {
    "blocking": ["--depth", "1"],
    "pipelined, launched at once": ["--depth", "2", "--late-launch", "false"],
    "pipelined, launched late": ["--depth", "2"],
}


@dataclass(frozen=True)
class FirstToken:
    """One mode's times to first token under load."""

    mode: str
    p50_ms: float
    p90_ms: float
    step_ms: float  # of the background streams during the probes

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {name: round(v, 3) if isinstance(v, float) else v for name, v in asdict(self).items()}


def measure(profile: str, rows: int, probes: int, rounds: int) -> list[FirstToken]:
    """All modes, `rounds` times in turn; medians over all probes."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    steps: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(rounds):
        for mode, flags in MODES.items():
            seen, step_ms = _round(profile, rows, probes, flags, seed=turn)
            times[mode] += seen
            steps[mode].append(step_ms)
    return [
        FirstToken(
            mode,
            statistics.median(times[mode]) * 1e3,
            statistics.quantiles(times[mode], n=10)[8] * 1e3,
            statistics.median(steps[mode]),
        )
        for mode in MODES
    ]


def _round(profile: str, rows: int, probes: int, flags: list[str], *, seed: int) -> tuple[list[float], float]:
    sim = [
        "--device",
        "sim",
        "--sim-profile",
        profile,
        "--max-rows",
        str(rows + 8),
        "--num-pages",
        str(rows * 800),
    ]
    with ExitStack() as stack:
        url, probe = stack.enter_context(serving([*sim, *flags]))

        async def run() -> tuple[list[float], float]:
            counts = [0] * rows
            streams = [asyncio.create_task(read_stream(url, counts, i)) for i in range(rows)]
            while not all(counts):
                await asyncio.sleep(0.05)
            first = await asyncio.to_thread(probe.beat)
            rng = random.Random(seed)
            times = []
            for number in range(probes):
                await asyncio.sleep(rng.uniform(0.005, 0.03))
                times.append(await _first_token(url, number))
            last = await asyncio.to_thread(probe.beat)
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            elapsed_s = last.metrics["loop_seconds_total"] - first.metrics["loop_seconds_total"]
            return times, elapsed_s / (last.step - first.step) * 1e3

        return asyncio.run(run())


async def _first_token(url: str, number: int) -> float:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        started_s = time.perf_counter()
        post_completion(writer, f"probe {number}", max_tokens=2)
        while b"data: {" not in await reader.read(65536):
            pass
        return time.perf_counter() - started_s
    finally:
        writer.close()
