"""Owns a load test's run: when requests leave, what stops it, and the result. One asyncio task, one per request.

Open loop: arrivals follow the plan whatever the server does, and a request that cannot leave is an error, not
a pause. Closed loop: a fixed number of requests is kept in flight, which finds the rate a server sustains but
hides its queueing; the report says which of the two it was.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

import aiohttp

from loadtest import sse
from loadtest.calls import OK, Call, Tally
from loadtest.histogram import Histogram
from loadtest.lanes import Lanes
from loadtest.pictures import Picture, draw_pictures
from loadtest.scenarios import MAX_IN_FLIGHT, Planned, Scenario, ScenarioError, plan
from loadtest.surfaces import build_body, lane_of

LOST_AFTER: Final = 64
"""The server counts as dead after this many requests in a row without an answer, over at least `LOST_AFTER_S`."""
LOST_AFTER_S: Final = 2.0
_NO_ANSWER: Final = frozenset({"connection_refused", "disconnected", "client_overload"})
_READY_POLL_S: Final = 0.1


@dataclass(slots=True)
class Second:
    """Counts of what ended, and what arrived, in one second of the run."""

    arrived: int = 0
    ok: int = 0
    good: int = 0
    failed: int = 0
    tokens: int = 0
    in_flight: int = 0  # the most at once


@dataclass(slots=True)
class Point:
    """One request in the latency-over-time plot, seconds from the run's start; `ttft_s` 0: no output."""

    due_s: float
    ttft_s: float
    total_s: float
    surface: str
    code: str


@dataclass(slots=True)
class Result:
    """Everything one run measured."""

    scenario: Scenario
    started_at: str
    elapsed_s: float = 0.0  # what rates are divided by
    stopped: str | None = None  # why it ended early
    groups: dict[str, Tally] = field(default_factory=dict)  # "all", and one per interface
    lateness: Histogram = field(default_factory=Histogram)  # sent after due, the client's own fault
    client_cpu_share: float = 0.0  # of one core
    seconds: list[Second] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    @property
    def all(self) -> Tally:
        """Every request together."""
        return self.groups["all"]


Progress = Callable[[float, Result], None]
"""Called a few times a second with the seconds gone and the result so far."""


async def run(
    scenario: Scenario, *, stop: asyncio.Event | None = None, on_progress: Progress | None = None
) -> Result:
    """Run a scenario to its end, to `stop`, or to the server's death, and return what was measured.

    Raises `ScenarioError` before anything is sent when the scenario may not run, or the server that a warm-up waits
    for is not ready in time. A server that fails, refuses or dies later is a result, not an exception.
    """
    scenario.check()
    pictures = draw_pictures(
        scenario.pictures,
        scenario.seed,
        size_px=scenario.picture_px,
        height_px=scenario.picture_height_px,
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
    headers = {"Content-Type": "application/json", **sse.key_headers(scenario.api_key)}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        lanes = Lanes(session, scenario.url.rstrip("/"), num_connections=scenario.connections)
        try:
            if scenario.warmup_requests:
                await _warm_up(scenario, session, lanes, pictures)
            measured = _Run(scenario, session, lanes, pictures, stop or asyncio.Event(), on_progress)
            return await measured.run()
        finally:
            await lanes.close()


async def _warm_up(
    scenario: Scenario, session: aiohttp.ClientSession, lanes: Lanes, pictures: list[Picture]
) -> None:
    """Wait until the server is ready and send a few unmeasured requests."""
    await _wait_until_ready(scenario, session)
    few = replace(
        scenario, in_flight=4, max_requests=scenario.warmup_requests, seconds=scenario.request_timeout_s,
        seed=scenario.seed + 1, warmup_requests=0,
    )  # fmt: skip
    await _Run(few, session, lanes, pictures, asyncio.Event(), None).run()


async def _wait_until_ready(scenario: Scenario, session: aiohttp.ClientSession) -> None:
    """Ask until the server says that it is ready. Raises `ScenarioError` after `ready_s`: figures of a server that
    is still starting would be figures of nothing."""
    url = scenario.url.rstrip("/") + "/readyz"
    deadline_s = time.monotonic() + scenario.ready_s
    while True:
        try:
            async with session.get(url) as response:
                if response.status in (200, 404):  # 404: a server without that page is taken as ready
                    return
                found = f"status {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            found = type(error).__name__
        if time.monotonic() >= deadline_s:
            raise ScenarioError(
                f"{url} was not ready within {scenario.ready_s:g} s (last answer: {found}); nothing was measured. "
                "Raise --ready-s if the server needs longer to start"
            )
        await asyncio.sleep(_READY_POLL_S)


class _Run:
    """The state of one run."""

    def __init__(
        self,
        scenario: Scenario,
        session: aiohttp.ClientSession,
        lanes: Lanes,
        pictures: list[Picture],
        stop: asyncio.Event,
        on_progress: Progress | None,
    ) -> None:
        self._scenario = scenario
        self._session = session
        self._lanes = lanes
        self._pictures = pictures
        self._url = scenario.url.rstrip("/")
        self._stop = stop
        self._on_progress = on_progress
        self._start_s = 0.0
        self._in_flight: set[asyncio.Task[None]] = set()
        self._num_open = 0
        self._unanswered = 0
        self._unanswered_since_s = 0.0
        self._result = Result(scenario, started_at=datetime.now(UTC).isoformat(timespec="seconds"))
        self._result.groups["all"] = Tally(scenario.slo)

    async def run(self) -> Result:
        cpu_before_s = _cpu_s()
        self._start_s = time.perf_counter()
        reporter = asyncio.create_task(self._report_progress()) if self._on_progress else None
        arrivals = asyncio.create_task(
            self._arrive_open() if self._scenario.is_open_loop else self._keep_closed()
        )
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((arrivals, stopped), return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                self._result.stopped = self._result.stopped or "interrupted"
            elif self._in_flight:
                await asyncio.wait(self._in_flight, timeout=self._scenario.grace_s)
        finally:
            for task in (arrivals, stopped, reporter, *self._in_flight):
                if task is not None:
                    task.cancel()
            await asyncio.gather(
                *(task for task in (arrivals, stopped, reporter, *self._in_flight) if task is not None),
                return_exceptions=True,
            )
        if not arrivals.cancelled() and (error := arrivals.exception()) is not None:
            raise error  # a fault of this client, not of the server
        elapsed_s = time.perf_counter() - self._start_s
        self._result.client_cpu_share = (_cpu_s() - cpu_before_s) / elapsed_s
        self._result.elapsed_s = self._measured_s(elapsed_s)
        return self._result

    def _measured_s(self, elapsed_s: float) -> float:
        """What rates are divided by: up to the last good end or the last arrival, not the wait for lost stragglers."""
        points = self._result.points
        if not points or self._result.stopped:
            return elapsed_s
        last_s = max(
            max(point.due_s, point.due_s + point.total_s if point.code == OK else 0.0) for point in points
        )
        ran_its_time = self._scenario.is_open_loop and len(points) < self._scenario.max_requests
        return max(last_s, self._scenario.seconds) if ran_its_time else last_s

    async def _arrive_open(self) -> None:
        for planned in plan(self._scenario):
            delay_s = self._start_s + planned.due_s - time.perf_counter()
            await asyncio.sleep(max(delay_s, 0.0))  # if late, sleep 0 so that the reading tasks run
            call = Call(planned.surface, self._start_s + planned.due_s)
            if self._num_open >= MAX_IN_FLIGHT:
                call.on_end(time.perf_counter(), "client_overload")
                self._count(call)
                continue
            task = asyncio.create_task(self._fire(planned, call))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)

    async def _keep_closed(self) -> None:
        plans = plan(self._scenario)
        deadline_s = self._start_s + self._scenario.seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(self._scenario.in_flight):
                group.create_task(self._one_after_another(plans, deadline_s))

    async def _one_after_another(self, plans: Iterator[Planned], deadline_s: float) -> None:
        while (now_s := time.perf_counter()) < deadline_s and not self._stop.is_set():
            planned = next(plans, None)
            if planned is None:
                return
            call = Call(planned.surface, now_s)
            await self._fire(planned, call)
            if call.code != OK:
                await asyncio.sleep(0.01)  # pause, so that a server that refuses at once is not flooded

    async def _fire(self, planned: Planned, call: Call) -> None:
        self._num_open += 1
        second = self._second(call.due_s)
        second.arrived += 1
        second.in_flight = max(second.in_flight, self._num_open)
        timeout_s = self._scenario.request_timeout_s
        body = build_body(planned, self._pictures[planned.picture], self._scenario.model)
        try:
            if planned.surface == "responses":
                await self._lanes.stream(call, lane_of(planned), body, timeout_s)
            else:
                await sse.stream(self._session, self._url, call, body, timeout_s)
        finally:
            self._num_open -= 1
            self._count(call)

    def _count(self, call: Call) -> None:
        result = self._result
        result.all.on_call(call)
        result.groups.setdefault(call.surface, Tally(self._scenario.slo)).on_call(call)
        result.lateness.record(call.sent_s - call.due_s)
        ttft_s = call.first_s - call.due_s if call.first_s else 0.0
        due_s = call.due_s - self._start_s
        result.points.append(Point(due_s, ttft_s, call.end_s - call.due_s, call.surface, call.code))
        second = self._second(call.end_s)
        if call.code == OK:
            second.ok += 1
            second.good += call.is_good(self._scenario.slo)
            second.tokens += call.num_tokens
        else:
            second.failed += 1
        self._watch_for_loss(call)

    def _watch_for_loss(self, call: Call) -> None:
        if call.code not in _NO_ANSWER:
            self._unanswered = 0
            return
        if self._unanswered == 0:
            self._unanswered_since_s = call.end_s
        self._unanswered += 1
        if self._unanswered >= LOST_AFTER and call.end_s - self._unanswered_since_s >= LOST_AFTER_S:
            self._result.stopped = f"the server does not answer ({call.code})"
            self._stop.set()

    def _second(self, at_s: float) -> Second:
        seconds = self._result.seconds
        index = max(int(at_s - self._start_s), 0)
        while len(seconds) <= index:
            seconds.append(Second())
        return seconds[index]

    async def _report_progress(self) -> None:
        assert self._on_progress is not None
        while True:
            await asyncio.sleep(0.25)
            self._on_progress(time.perf_counter() - self._start_s, self._result)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
