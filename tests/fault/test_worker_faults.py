"""What the page on faults promises when a worker dies, hangs, or a client leaves. Real processes, real sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from tests.integration.stack import SIM, Stack, stack, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def only_stack() -> Iterator[Stack]:
    with stack(SIM) as running:
        yield running


@pytest.fixture
def sim_stack(only_stack: Stack) -> Stack:
    """The one stack of this file, serving and with nothing to do, whatever the test before did to it."""
    if only_stack.worker is None or only_stack.worker.poll() is not None:
        only_stack.start_worker()
    only_stack.wait_ready()
    probe = only_stack.probe()
    try:
        until(lambda: probe.beat().num_running == 0, 10.0)
    finally:
        probe.close()
    return only_stack


def fresh_connections() -> aiohttp.ClientSession:
    """A client that keeps no connection: the gateway closes one whose stream failed, perhaps as it is used again."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))


def body(max_tokens: int) -> dict[str, object]:
    return {
        "model": "sim",
        "prompt": "x",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


async def test_killed_worker_gives_every_client_one_terminal_error_and_comes_back(sim_stack: Stack) -> None:
    async with fresh_connections() as session:

        async def client() -> tuple[float, list[dict[str, Any]]]:
            async with session.post(f"{sim_stack.url}/v1/completions", json=body(3000)) as response:
                seen = [event async for event in events(response)]
                return time.perf_counter(), seen

        clients = [asyncio.create_task(client()) for _ in range(8)]
        await asyncio.sleep(0.5)
        assert sim_stack.worker is not None
        killed_s = time.perf_counter()
        sim_stack.worker.kill()
        for ended_s, seen in await asyncio.gather(*clients):
            assert ended_s - killed_s < 1.0, "the terminal error took too long"
            assert "error" in seen[-1]
            assert seen[-1]["error"]["code"] == "worker_lost"
            assert not any("error" in event for event in seen[:-1])
        async with session.get(f"{sim_stack.url}/readyz") as response:
            assert response.status == 503
        sim_stack.worker.wait()
        sim_stack.start_worker()
        await asyncio.to_thread(sim_stack.wait_ready)
        async with session.post(f"{sim_stack.url}/v1/completions", json=body(3)) as response:
            seen = [event async for event in events(response)]
            assert response.status == 200 and "error" not in seen[-1]


async def test_stopped_worker_is_seen_by_its_progress(sim_stack: Stack) -> None:
    assert sim_stack.worker is not None
    async with fresh_connections() as session:
        async with session.post(f"{sim_stack.url}/v1/completions", json=body(3000)) as response:
            await response.content.readline()
            sim_stack.worker.send_signal(signal.SIGSTOP)
            stopped_s = time.perf_counter()
            seen = [event async for event in events(response)]
        assert time.perf_counter() - stopped_s < 4.5
        assert "error" in seen[-1]
        async with session.get(f"{sim_stack.url}/readyz") as ready:
            assert ready.status == 503
        sim_stack.worker.send_signal(signal.SIGCONT)
        await asyncio.to_thread(sim_stack.wait_ready)


async def test_client_that_leaves_frees_its_row_and_pages(sim_stack: Stack) -> None:
    probe = sim_stack.probe()
    try:
        before = await asyncio.to_thread(probe.beat)
        async with fresh_connections() as session:
            for _ in range(3):
                response = await session.post(f"{sim_stack.url}/v1/completions", json=body(3000))
                await response.content.readline()
                response.close()

        def is_idle() -> bool:
            beat = probe.beat()
            return beat.num_running == 0 and beat.free_pages == before.free_pages

        await asyncio.to_thread(until, is_idle)
    finally:
        probe.close()


async def test_dead_gateways_sequences_are_cancelled_and_others_go_on(sim_stack: Stack) -> None:
    other = Stack(sim_stack.folder, [], {})
    other.start_gateway()
    probe = sim_stack.probe()
    try:
        await asyncio.to_thread(other.wait_ready)
        async with fresh_connections() as session:
            doomed = await session.post(f"{other.url}/v1/completions", json=body(3900))
            await doomed.content.readline()
            async with session.post(f"{sim_stack.url}/v1/completions", json=body(3900)) as response:
                await response.content.readline()
                assert (await asyncio.to_thread(probe.beat)).num_running == 2
                assert other.gateway is not None
                other.gateway.kill()
                other.gateway.wait()
                await asyncio.to_thread(until, lambda: probe.beat().num_running <= 1, 10.0)
                seen = [event async for event in events(response)]
                assert "error" not in seen[-1]
            doomed.close()
    finally:
        probe.close()
        other.stop()
