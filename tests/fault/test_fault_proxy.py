"""What clients see through a spoiled network: between client and gateway, and between gateway and worker (tcp://)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from loadtest.client import Result, run
from loadtest.fault_proxy import FaultProxy, Faults
from loadtest.peers.process import free_port
from loadtest.scenarios import Scenario, Target
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread

QUESTIONS = Scenario(transport="sse", rate=50.0, seconds=1.0, max_requests=4, min_tokens=8, max_tokens=8,
                     request_timeout_s=1.0, grace_s=2.0, target=Target(takes_images=False, surfaces=("query",)))  # fmt: skip


@contextmanager
def proxied(to_port: int, faults: Faults) -> Iterator[FaultProxy]:
    """A proxy on a loop and thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    proxy = FaultProxy("127.0.0.1", to_port, faults=faults)
    asyncio.run_coroutine_threadsafe(proxy.__aenter__(), loop).result(5)
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy.__aexit__(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def served() -> Iterator[GatewayThread]:
    with FakeWorker(step_s=0.002) as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        worker.reply("a rather long answer, of which a part is lost")
        gateway.wait_ready()
        yield gateway


def ask_through(served: GatewayThread, faults: Faults) -> Result:
    """The same few questions through a proxy with these faults."""
    with proxied(urlsplit(served.url).port or 0, faults) as proxy:
        result = asyncio.run(run(replace(QUESTIONS, url=f"http://127.0.0.1:{proxy.port}")))
    deadline_s = time.monotonic() + 5
    while served.gateway.service.num_in_flight and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert served.gateway.service.num_in_flight == 0  # whatever clients saw, nothing is left running
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "codes"),
    [
        (Faults(), set()),
        (Faults(cut_after=400), {"disconnected", "truncated"}),
        (Faults(cut_after=400, reset=True), {"disconnected"}),
        (Faults(blackhole=True), {"timeout"}),
    ],
)
def test_clients_of_a_gateway(served: GatewayThread, faults: Faults, codes: set[str]) -> None:
    result = ask_through(served, faults)
    assert set(result.all.errors) <= codes
    assert result.all.ok == (0 if codes else 4) and result.all.sent == 4


@pytest.mark.slow
def test_latency_and_bandwidth_are_in_what_clients_measure(served: GatewayThread) -> None:
    late = ask_through(served, Faults(latency_s=0.1))
    assert late.all.ok == 4 and late.all.ttft.min_ms >= 199  # there and back
    narrow = ask_through(served, Faults(bandwidth=4000.0))
    assert narrow.all.ok == 4 and narrow.all.total.min_ms > 100


@pytest.mark.slow
def test_a_cut_between_gateway_and_worker_ends_streams_with_an_error_and_heals() -> None:
    port = free_port()
    with FakeWorker(endpoint=f"tcp://127.0.0.1:{port}", step_s=0.05) as worker:
        worker.reply("x" * 200)
        faults = Faults()
        with (
            proxied(port, faults) as proxy,
            GatewayThread(workers=[f"tcp://127.0.0.1:{proxy.port}"]) as gateway,
        ):
            gateway.wait_ready()
            asked = replace(QUESTIONS, url=gateway.url, max_tokens=100, min_tokens=100, request_timeout_s=8.0)

            async def cut_in_the_middle() -> Result:
                loop = asyncio.get_running_loop()
                loop.call_later(
                    0.6,
                    lambda: (
                        proxy._tasks and next(iter(proxy._tasks)).get_loop().call_soon_threadsafe(proxy.cut)
                    ),
                )
                return await run(asked)

            result = asyncio.run(cut_in_the_middle())
            assert set(result.all.errors) == {"worker_lost"}
            assert all(point.total_s < 2.0 for point in result.points)
            worker.reply("short")
            gateway.wait_ready()
            again = asyncio.run(run(replace(asked, seed=1)))
            assert again.all.ok == 4
