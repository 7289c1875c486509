"""Owns `degas bench loop`: blocking against pipelined decoding on the simulated device, with everything else real.

A real worker holds each step for a GPU's published forward time, a real gateway streams every row to a real
client over SSE, and the worker's own heartbeats tell what a step cost. Runs in the main thread.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from loadtest.bench.processes import WorkerProbe, serving
from loadtest.bench.timeline import Recording
from shared.protocol import Beat

STREAM_TOKENS = 12_000  # six seconds of the quickest profile: no stream ends while it is measured


@dataclass(frozen=True)
class LoopRow:
    """One line of the table. Times per step; `host_us` and `bubble_ms` are the pipelined run's."""

    rows: int
    forward_ms: float
    sample_ms: float
    blocking_ms: float
    pipelined_ms: float
    host_us: float
    bubble_ms: float
    gain_pct: float
    busy_pct: float
    tokens_per_s: float

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Window:
    """What a worker did between two heartbeats."""

    step_ms: float
    host_us: float
    bubble_ms: float
    device_ms: float
    received_per_s: float
    trace: bytes


def measure_row(rows: int, profile: str, seconds: float, depth: int = 2) -> tuple[LoopRow, list[Recording]]:
    """Blocking, then pipelined at a depth, at one batch size; and a recording of each."""
    from worker.sim.profiles import PROFILES

    costs = PROFILES[profile]
    blocking, pipelined = (_measure(rows, profile, steps, seconds) for steps in (1, depth))
    row = LoopRow(
        rows,
        costs.forward(rows, 0, 0) * 1e3,
        costs.sample_s * 1e3,
        blocking.step_ms,
        pipelined.step_ms,
        pipelined.host_us,
        pipelined.bubble_ms,
        (blocking.step_ms / pipelined.step_ms - 1) * 100,
        100 * pipelined.device_ms / pipelined.step_ms,
        pipelined.received_per_s,
    )
    return row, [
        Recording.parse(f"blocking: {blocking.step_ms:.2f} ms a step", blocking.trace),
        Recording.parse(f"pipelined: {pipelined.step_ms:.2f} ms a step", pipelined.trace),
    ]


def _measure(rows: int, profile: str, depth: int, seconds: float) -> Window:
    flags = ["--device", "sim", "--sim-profile", profile, "--depth", str(depth), "--max-rows", str(rows)]
    flags += ["--num-pages", str(rows * 800 + 1), "--mixed-tokens", str(rows + 512)]
    with serving(flags) as (url, probe):
        return asyncio.run(_stream_and_watch(url, probe, rows, seconds))


async def _stream_and_watch(url: str, probe: WorkerProbe, rows: int, seconds: float) -> Window:
    counts = [0] * rows
    streams = [asyncio.create_task(read_stream(url, counts, i)) for i in range(rows)]
    deadline_s = time.monotonic() + 30
    while not all(counts):
        await asyncio.sleep(0.05)
        broken = next((t for t in streams if t.done()), None)
        if broken is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"a stream ended early: {broken and broken.exception()}")
    first, received = await asyncio.to_thread(probe.beat), sum(counts)
    started_s = time.perf_counter()
    await asyncio.sleep(seconds)
    last, received = await asyncio.to_thread(probe.beat), sum(counts) - received
    elapsed_s = time.perf_counter() - started_s
    trace = await asyncio.to_thread(probe.trace, 40)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return _window(first, last, received / elapsed_s, trace)


def _window(first: Beat, last: Beat, received_per_s: float, trace: bytes) -> Window:
    def delta(name: str) -> float:
        return last.metrics[name] - first.metrics[name]

    steps = delta("steps_total")
    return Window(
        delta("loop_seconds_total") / steps * 1e3,
        delta("host_seconds_total") / steps * 1e6,
        delta("bubble_seconds_total") / steps * 1e3,
        delta("device_busy_seconds_total") / steps * 1e3,
        received_per_s,
        trace,
    )


async def read_stream(url: str, counts: list[int], index: int) -> None:
    """One SSE client that only counts its events, so that measuring costs little."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    post_completion(writer, f"stream {index}", max_tokens=STREAM_TOKENS)
    try:
        while data := await reader.read(65536):
            counts[index] += data.count(b"data: {")
    finally:
        writer.close()


def post_completion(writer: asyncio.StreamWriter, prompt: str, *, max_tokens: int) -> None:
    """Ask the simulated model for a stream of exactly `max_tokens` tokens."""
    body = (
        f'{{"model":"sim","prompt":"{prompt}","max_tokens":{max_tokens},"ignore_eos":true,"stream":true,'
        f'"temperature":0}}'
    ).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
