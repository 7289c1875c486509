"""Owns `degas bench cancels`: random cancels against a real worker, then a check that nothing is left behind.

Runs in the main thread. Half of the sequences are cancelled over the wire while queued, in prefill or in flight; clients
of a gateway also hang up.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import zmq

from loadtest.bench.processes import WorkerProbe, gateway_and_worker, serving
from shared.protocol import (
    PROTOCOL_VERSION,
    Beat,
    Cancel,
    Hello,
    Ping,
    Ready,
    Rejected,
    Sampling,
    StepOutputs,
    Submit,
    decode_from_worker,
    encode,
    pack_i32,
    schema_hash,
)

FLAGS = [
    "--device",
    "sim",
    "--sim-profile",
    "small",
    "--max-rows",
    "64",
    "--max-waiting",
    "512",
    "--num-pages",
    "600",
]


@dataclass(frozen=True)
class Baseline:
    """The figures that must be the same before and after."""

    running: int
    waiting: int
    free_pages: int
    worker_fds: int
    worker_threads: int
    gateway_fds: int
    gateway_threads: int


@dataclass(frozen=True)
class CancelReport:
    """What happened, with the baseline before and after."""

    submitted: int
    cancelled: int
    finished: int
    rejected: int
    hung_up: int
    seconds: float
    before: Baseline
    after: Baseline

    @property
    def is_clean(self) -> bool:
        """Whether everything is back at its baseline."""
        return self.before == self.after and self.finished + self.rejected == self.submitted

    def to_json(self) -> dict[str, object]:
        """Plain numbers."""
        return {**asdict(self), "is_clean": self.is_clean}


def run_cancels(count: int, *, hang_ups: int, seed: int = 0) -> CancelReport:
    """Submit `count` sequences, cancel about half at random moments, hang up on `hang_ups` streams."""
    with serving(FLAGS) as (url, probe):
        gateway_pid, worker_pid = gateway_and_worker()
        started_s = time.perf_counter()
        asyncio.run(
            _hang_up(url, min(32, hang_ups), seed + 1)
        )  # so that pools and caches have reached their size
        time.sleep(1.0)
        before = _baseline(probe, worker_pid, gateway_pid)
        finished, rejected, cancelled = _storm(probe, count, seed)
        asyncio.run(_hang_up(url, hang_ups, seed))
        after = before
        for _ in range(5):
            time.sleep(1.0)
            after = _baseline(probe, worker_pid, gateway_pid)
            if after == before:
                break
        seconds = time.perf_counter() - started_s
        return CancelReport(count, cancelled, finished, rejected, hang_ups, seconds, before, after)


def _baseline(probe: WorkerProbe, worker_pid: int, gateway_pid: int) -> Baseline:
    beat = probe.beat()

    def count(pid: int, what: str) -> int:
        return len(list(Path(f"/proc/{pid}/{what}").iterdir()))

    return Baseline(
        beat.num_running,
        beat.num_waiting,
        beat.free_pages,
        count(worker_pid, "fd"),
        count(worker_pid, "task"),
        count(gateway_pid, "fd"),
        count(gateway_pid, "task"),
    )


def _storm(probe: WorkerProbe, count: int, seed: int) -> tuple[int, int, int]:
    """Submit and cancel over a lease of the benchmark's own, as fast as the worker's queue takes submissions."""
    rng = random.Random(seed)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(probe.endpoint)
    try:
        socket.send(encode(Hello(PROTOCOL_VERSION, schema_hash(), "storm", 30.0)))
        ready = decode_from_worker(socket.recv_multipart()[0])
        assert isinstance(ready, Ready)
        live: set[int] = set()
        submitted = finished = rejected = cancelled = 0
        last_s = time.monotonic()
        while finished + rejected < count:
            while submitted < count and len(live) < 400:
                prompt = pack_i32([rng.randrange(20, 200) for _ in range(rng.randint(1, 60))])
                sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=submitted)
                task = rng.choice(["text", "text", "detect", "point"])
                limit = rng.randint(1, 40)
                submit = Submit(
                    ready.epoch, submitted, "storm", prompt, limit, sampling, task=task, max_objects=9
                )
                socket.send(encode(submit))
                live.add(submitted)
                submitted += 1
                if rng.random() < 0.5:
                    victim = submitted - 1 if rng.random() < 0.5 else rng.choice(tuple(live))
                    socket.send(encode(Cancel(ready.epoch, [victim])))
                    cancelled += 1
            while socket.poll(20 if len(live) >= 400 or submitted == count else 0):
                message = decode_from_worker(socket.recv_multipart()[0])
                if isinstance(message, StepOutputs):
                    for finish in message.finishes:
                        live.remove(finish.sequence_id)
                        finished += 1
                elif isinstance(message, Rejected):
                    live.remove(message.sequence_id)
                    rejected += 1
                elif isinstance(message, Beat):
                    socket.send(encode(Ping(ready.epoch)))
                last_s = time.monotonic()
            if time.monotonic() - last_s > 20:
                raise TimeoutError(f"{len(live)} sequences never ended")
        return finished, rejected, cancelled
    finally:
        socket.close()
        context.term()


async def _hang_up(url: str, count: int, seed: int) -> None:
    """Open streams over HTTP and close the connection at a random moment, 32 at a time."""
    rng = random.Random(seed)
    gate = asyncio.Semaphore(32)
    parts = urlsplit(url)

    async def one(delay_s: float) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            body = b'{"model":"sim","prompt":"gone","max_tokens":3000,"ignore_eos":true,"stream":true}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            try:
                await asyncio.wait_for(reader.read(100), delay_s)
                await asyncio.sleep(delay_s / 4)
            except TimeoutError:
                pass
            writer.transport.abort()

    await asyncio.gather(*(one(rng.uniform(0.0, 0.05)) for _ in range(count)))
