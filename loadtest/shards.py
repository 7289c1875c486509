"""Owns a load test by several processes: their parts of the load, one start, one result. Main thread and child processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Coroutine
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from itertools import zip_longest
from typing import Any, Final, TypeVar

from loadtest.calls import Tally
from loadtest.client import Progress, Result, Second, run, warm_up_of
from loadtest.scenarios import Scenario, ScenarioError
from loadtest.target import Meter, client_session, read_meter

Out = TypeVar("Out")

_START_S: Final = 2.0  # until every process has loaded the client
_IDLE_S: Final = 5.0  # how long a target has to put away what clients left


def run_alone(
    scenario: Scenario, on_progress: Progress | None = None, start_at_s: float | None = None
) -> Result:
    """One process' part, in this process. An interrupt ends it with what was measured. Raises `ScenarioError`."""

    async def watched() -> Result:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        return await run(scenario, stop=stop, on_progress=on_progress, start_at_s=start_at_s)

    return on_loop(watched())


def run_metered(scenario: Scenario, on_progress: Progress | None = None) -> Result:
    """The whole scenario, in as many processes as it says, with the target's meters read before and after."""
    before = on_loop(_read(scenario))
    result = _run_together(scenario) if scenario.processes > 1 else run_alone(scenario, on_progress)
    after = on_loop(_read_when_idle(scenario))
    result.joules = _grown(before.joules, after.joules)
    result.still_in_flight = None if after.in_flight is None else int(after.in_flight)
    if price := scenario.price_per_hour or scenario.target.price_per_hour or after.price_per_hour:
        result.cost = price * result.elapsed_s / 3600
    return result


def merge(scenario: Scenario, parts: list[Result]) -> Result:
    """One result of all parts: counts and histograms add up exactly; so do seconds, whose starts are the same."""
    whole = Result(scenario, started_at=min(part.started_at for part in parts))
    whole.groups["all"] = Tally(scenario.slo)
    for part in parts:
        for mine, theirs in ((whole.groups, part.groups), (whole.kinds, part.kinds)):
            for name, tally in theirs.items():
                mine.setdefault(name, Tally(scenario.slo)).add(tally)
        whole.lateness.add(part.lateness)
        whole.points += part.points
    whole.elapsed_s = max(part.elapsed_s for part in parts)
    whole.stopped = next((part.stopped for part in parts if part.stopped), None)
    whole.client_cpu_share = max(part.client_cpu_share for part in parts)
    names = [one.name for one in fields(Second)]
    for together in zip_longest(*(part.seconds for part in parts), fillvalue=Second()):
        whole.seconds.append(Second(*(sum(getattr(one, name) for one in together) for name in names)))
    return whole


def on_loop(work: Coroutine[Any, Any, Out]) -> Out:
    """Run on a fresh loop, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _run_together(scenario: Scenario) -> Result:
    """Processes of their own, started from nothing: a fork would share sockets and loops."""
    if scenario.warmup_requests:
        run_alone(warm_up_of(scenario))
    context = multiprocessing.get_context("spawn")
    start_at_s = time.time() + _START_S + 0.3 * scenario.processes
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the terminal interrupts the processes too; each ends itself
    try:
        with ProcessPoolExecutor(scenario.processes, mp_context=context) as pool:
            parts = [pool.submit(run_alone, share, None, start_at_s) for share in scenario.shares()]
            found = [part.result() for part in parts]
    except BrokenProcessPool:
        raise ScenarioError("a client process died; nothing was measured. Try fewer --processes") from None
    finally:
        signal.signal(signal.SIGINT, before)
    return merge(scenario, found)


async def _read(scenario: Scenario) -> Meter:
    async with client_session(scenario) as session:
        return await read_meter(scenario, session)


async def _read_when_idle(scenario: Scenario) -> Meter:
    """The meters once nothing is under way any more, or after a few seconds."""
    async with client_session(scenario) as session:
        deadline_s = time.monotonic() + _IDLE_S
        while (meter := await read_meter(scenario, session)).in_flight and time.monotonic() < deadline_s:
            await asyncio.sleep(0.1)
        return meter


def _grown(before: float | None, after: float | None) -> float | None:
    """What a counter grew by; None where it is not there, or began anew meanwhile."""
    return None if before is None or after is None or after < before else after - before
