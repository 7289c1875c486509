"""Owns starting services inside a fault's loop: fleets and supervised servers, started and ended on a thread. Asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, Final, TypeVar

from loadtest.bench.chaos_server import Server, serving
from loadtest.bench.processes import WorkerProbe
from loadtest.fleet import Fleet, fleet

T = TypeVar("T")
SIM: Final = ("--model", "sim", "--device", "sim")
BROKEN: Final = ("degas.rooms", "loadtest.chaos.broken_worker")


@asynccontextmanager
async def entered(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A blocking context manager, entered and left on a thread."""
    made = await asyncio.to_thread(manager.__enter__)
    try:
        yield made
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


def sim_fleet(
    *flags: str, profile: str = "b200", settings: Mapping[str, str] | None = None, **more: Any
) -> AbstractContextManager[Any]:
    """A fleet over the simulated device, for `async with`."""
    return fleet([*SIM, "--sim-profile", profile, *flags], gateway_settings=settings, **more)


def supervised(flags: Sequence[str]) -> AbstractContextManager[Server]:
    """`degas serve` over the simulated device."""
    return serving([*SIM, *flags])


async def probe_of(running: Fleet, number: int = 0) -> WorkerProbe:
    """A lease of one's own at a worker."""
    worker = running.workers[number]
    return await asyncio.to_thread(WorkerProbe, worker.address, [worker.watched])


async def until(condition: Callable[[], bool], timeout_s: float, *, poll_s: float = 0.005) -> float:
    """Seconds until it held; infinite when it did not in time."""
    started_s = time.perf_counter()
    while not condition():
        if time.perf_counter() - started_s > timeout_s:
            return float("inf")
        await asyncio.sleep(poll_s)
    return time.perf_counter() - started_s
