"""A device as slow as a laptop's processor, in real processes: a prompt to the context limit and many at once kill nobody."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest

from loadtest.peers.waiting import Watched, wait_until

pytestmark = pytest.mark.slow

CONTEXT = 2048
LONG = CONTEXT - 8  # in one step this prompt takes 5 s, which is longer than a worker may be silent
STEP_S, GAP_S = 0.5, 0.3
SERVE = [
    *("-m", "degas", "serve", "--model", "sim", "--device", "sim", "--sim-profile", "laptop"),
    *("--context", str(CONTEXT), "--port", "0", "--grpc-port", "none", "--report", "true"),
    *("--step-s", str(STEP_S), "--gap-s", str(GAP_S)),
]


@dataclass
class Served:
    """A supervised server's address, and its process."""

    url: str
    supervisor: Watched

    def told(self) -> str:
        """All that the supervisor and its children said."""
        return self.supervisor.log.read_text()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    log = tmp_path / "output"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *SERVE], stdout=file, stderr=file)
    supervisor = Watched("degas serve", process, log)

    def ready() -> str:
        lines = [line for line in log.read_text().splitlines() if line.startswith("DEGAS-READY ")]
        return str(json.loads(lines[0].partition(" ")[2])["url"]) if lines else ""

    try:
        yield Served(wait_until(ready, "DEGAS-READY", [supervisor]), supervisor)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(40)


def body(num_tokens: int, max_tokens: int, **fields: object) -> dict[str, object]:
    text = "x" * num_tokens  # the simulated tokenizer makes one token of a letter
    return {"model": "sim", "prompt": text, "max_tokens": max_tokens, "temperature": 0, **fields}


async def ask(session: aiohttp.ClientSession, url: str, num_tokens: int) -> tuple[int, str]:
    async with session.post(f"{url}/v1/completions", json=body(num_tokens, 2)) as response:
        return response.status, await response.text()


async def token_times(session: aiohttp.ClientSession, url: str) -> list[float]:
    """When each event of a stream arrived."""
    given = body(16, 24, stream=True, ignore_eos=True)
    async with session.post(f"{url}/v1/completions", json=given) as response:
        assert response.status == 200
        return [time.perf_counter() async for line in response.content if line.startswith(b"data: {")]


async def num_in_worker(session: aiohttp.ClientSession, url: str) -> int:
    """Sequences that the worker has told of."""
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    counts = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(("degas_worker_num_running", "degas_worker_num_waiting"))
    ]
    return int(sum(counts))


async def test_no_prompt_kills_the_worker(served: Served) -> None:
    url = served.url
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=200)) as session:
        started_s = time.perf_counter()
        long = asyncio.create_task(ask(session, url, LONG))  # the first that the device ever sees
        while not await num_in_worker(session, url):
            assert not long.done(), long.result()
        stream = asyncio.create_task(token_times(session, url))
        shorts = [asyncio.create_task(ask(session, url, 16 + number)) for number in range(30)]
        answers = [await long]
        took_s = time.perf_counter() - started_s
        answers += await asyncio.gather(*shorts)
        times = await stream
    assert [status for status, _ in answers] == [200] * 31, [
        text for status, text in answers if status != 200
    ]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # A token without a whole character yet has no event of its own.
    assert len(gaps) >= 15 and max(gaps) < took_s / 3, (max(gaps), took_s)
    assert served.supervisor.process.poll() is None
    told = served.told()
    assert not [word for word in ("killing it", "serving again", "flights_lost", "silent") if word in told], (
        told
    )
