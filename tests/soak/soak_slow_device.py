"""A device as slow as a laptop's processor, in real processes: prompts to the context limit and many at once kill nobody."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

pytestmark = pytest.mark.slow

SERVE = [
    *("-m", "degas", "serve", "--model", "sim", "--device", "sim", "--sim-profile", "laptop"),
    *("--port", "0", "--grpc-port", "none", "--step-s", "0.5", "--gap-s", "0.3", "--report", "true"),
]


@pytest.fixture
def served() -> Iterator[tuple[str, Path]]:
    """A supervised server's address, and the file that holds what its supervisor says."""
    with tempfile.TemporaryDirectory(prefix="degas-test-") as folder:
        output = Path(folder) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen([sys.executable, *SERVE], stdout=file, stderr=file, env=os.environ)
        try:
            url = ""
            for _ in range(600):
                ready = [line for line in output.read_text().splitlines() if line.startswith("DEGAS-READY")]
                if ready:
                    url = json.loads(ready[0].partition(" ")[2])["url"]
                    break
                assert process.poll() is None, output.read_text()
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
            yield url, output
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(40)


async def ask(session: aiohttp.ClientSession, url: str, num_tokens: int) -> tuple[int, str]:
    body = {"model": "sim", "prompt": "x" * num_tokens, "max_tokens": 4, "temperature": 0}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        return response.status, await response.text()


async def test_no_prompt_kills_the_worker(served: tuple[str, Path]) -> None:
    url, output = served
    timeout = aiohttp.ClientTimeout(total=280)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        sizes = [6000, *(100 + number for number in range(31))]
        answers = await asyncio.gather(*(ask(session, url, size) for size in sizes))
    assert [status for status, _ in answers] == [200] * 32, [
        text for status, text in answers if status != 200
    ]
    told = output.read_text()
    assert "killing it" not in told and "serving again" not in told and "flights_lost" not in told
