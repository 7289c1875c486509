"""Owns a load test's run: when requests leave, what stops it, and the result. One asyncio task, one per request.

Open loop: arrivals follow the plan whatever the server does, and a request that cannot leave is an error, not
a pause. Closed loop: a fixed number of requests is kept in flight, which finds the rate a server sustains but
hides its queueing; the report says which of the two it was.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

import aiohttp

from loadtest import sse
from loadtest.bodies import build_body, lane_of
from loadtest.calls import LEFT, OK, Call, Tally
from loadtest.histogram import Histogram
from loadtest.lanes import Lanes
from loadtest.pictures import Picture, draw_pictures
from loadtest.questions import Ask, check_answer, make_ask, next_turn
from loadtest.scenarios import MAX_IN_FLIGHT, Planned, Scenario, plan
from loadtest.target import wait_until_ready

LOST_AFTER: Final = 64
"""The server counts as dead after this many requests in a row without an answer, over at least `LOST_AFTER_S`."""
LOST_AFTER_S: Final = 2.0
_NO_ANSWER: Final = frozenset({"connection_refused", "disconnected", "client_overload"})


@dataclass(slots=True)
class Second:
    """Counts of what ended, and what arrived, in one second of the run."""

    arrived: int = 0
    ok: int = 0
    good: int = 0
    failed: int = 0
    left: int = 0  # clients that went away on purpose
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
    kinds: dict[str, Tally] = field(
        default_factory=dict
    )  # one per kind of request; slow readers are in no other group
    lateness: Histogram = field(default_factory=Histogram)  # sent after due, the client's own fault
    client_cpu_share: float = 0.0  # of one core
    seconds: list[Second] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    cost: float | None = None  # what the target's devices cost meanwhile, in the currency of its price
    joules: float | None = None  # what they used meanwhile, where the target says
    still_in_flight: int | None = None  # requests that the target had under way shortly after the end

    @property
    def all(self) -> Tally:
        """Every request together."""
        return self.groups["all"]


Progress = Callable[[float, Result], None]
"""Called a few times a second with the seconds gone and the result so far."""


async def run(
    scenario: Scenario,
    *,
    stop: asyncio.Event | None = None,
    on_progress: Progress | None = None,
    start_at_s: float | None = None,
) -> Result:
    """Run a scenario to its end, to `stop`, or to the server's death, and return what was measured.

    `start_at_s`, of `time.time()`: when arrivals begin, so that several processes begin together. Raises
    `ScenarioError` before anything is sent when the scenario may not run, or the server that a warm-up waits for is
    not ready in time. A server that fails, refuses or dies later is a result, not an exception.
    """
    scenario.check()
    pictures = draw_pictures(
        scenario.pictures,
        scenario.seed,
        size_px=scenario.picture_px,
        height_px=scenario.picture_height_px,
    )
    async with _sessions(scenario) as (session, slow_session):
        lanes = Lanes(session, scenario.base_url, num_connections=scenario.connections)
        try:
            if scenario.warmup_requests:
                await wait_until_ready(scenario, session)
                few = warm_up_of(scenario)
                await _Run(few, session, slow_session, lanes, pictures, asyncio.Event(), None).run()
            if start_at_s is not None:
                await asyncio.sleep(max(0.0, start_at_s - time.time()))
            measured = _Run(
                scenario, session, slow_session, lanes, pictures, stop or asyncio.Event(), on_progress
            )
            return await measured.run()
        finally:
            await lanes.close()


def warm_up_of(scenario: Scenario) -> Scenario:
    """The few requests before a scenario that are not measured."""
    return replace(
        scenario, kind="short", in_flight=4, max_requests=scenario.warmup_requests,
        seconds=scenario.request_timeout_s, seed=scenario.seed + 1, warmup_requests=0, processes=1,
    )  # fmt: skip


@asynccontextmanager
async def _sessions(
    scenario: Scenario,
) -> AsyncIterator[tuple[aiohttp.ClientSession, aiohttp.ClientSession]]:
    """Connections as clients have them, and those of slow readers, whose sockets buffer next to nothing."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
    headers = {"Content-Type": "application/json", **sse.key_headers(scenario.api_key)}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
    slow_connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session,
        aiohttp.ClientSession(connector=slow_connector, timeout=timeout, headers=headers) as slow_session,
    ):
        yield session, slow_session


def _small_socket(info: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, *_ = info
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, sse.SLOW_BUFFER_BYTES)
    made.setblocking(False)
    return made


class _Run:
    """The state of one run."""

    def __init__(
        self,
        scenario: Scenario,
        session: aiohttp.ClientSession,
        slow_session: aiohttp.ClientSession,
        lanes: Lanes,
        pictures: list[Picture],
        stop: asyncio.Event,
        on_progress: Progress | None,
    ) -> None:
        self._scenario = scenario
        self._session = session
        self._slow_session = slow_session
        self._lanes = lanes
        self._pictures = pictures
        self._url = scenario.base_url
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
            call = self._call(planned, self._start_s + planned.due_s)
            if self._num_open >= MAX_IN_FLIGHT:
                call.on_end(time.perf_counter(), "client_overload")
                self._count(call)
                continue
            task = asyncio.create_task(self._one(planned, call))
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
            call = self._call(planned, now_s)
            await self._one(planned, call)
            if call.code not in (OK, LEFT):
                await asyncio.sleep(0.01)  # pause, so that a server that refuses at once is not flooded

    def _call(self, planned: Planned, due_s: float) -> Call:
        call = Call(planned.surface, due_s, planned.kind)
        call.leave_after = planned.leave_after
        call.pause_s = self._scenario.pause_s if planned.kind == "slow" else 0.0
        if planned.kind in ("chat", "structured"):
            call.pieces = []
        return call

    async def _one(self, planned: Planned, call: Call) -> None:
        """A planned request; of a conversation all its turns, each counted from when its question was asked."""
        ask = make_ask(planned, self._scenario, self._pictures)
        await self._fire(planned, call, ask)
        if planned.kind != "chat":
            return
        for turn in range(1, self._scenario.turns):
            if call.code != OK or self._stop.is_set():
                return
            await asyncio.sleep(self._scenario.think_s)
            ask = next_turn(ask, call.text, turn)
            call = self._call(planned, time.perf_counter())
            await self._fire(planned, call, ask)

    async def _fire(self, planned: Planned, call: Call, ask: Ask) -> None:
        self._num_open += 1
        second = self._second(call.due_s)
        second.arrived += 1
        second.in_flight = max(second.in_flight, self._num_open)
        scenario = self._scenario
        timeout_s = scenario.request_timeout_s
        body = build_body(planned, ask, scenario.model, is_degas=scenario.target.is_degas)
        try:
            if planned.surface == "responses":
                await self._lanes.stream(call, lane_of(planned), body, timeout_s)
            else:
                session = self._slow_session if call.pause_s else self._session
                await sse.stream(session, self._url, call, body, timeout_s)
        finally:
            self._num_open -= 1
            if ask.schema is not None:
                check_answer(call, ask.schema)
            self._count(call)

    def _count(self, call: Call) -> None:
        result = self._result
        slo = self._scenario.slo
        result.kinds.setdefault(call.kind, Tally(slo)).on_call(call)
        if call.kind == "slow":
            return  # its times say how slowly it reads
        result.all.on_call(call)
        result.groups.setdefault(call.surface, Tally(slo)).on_call(call)
        result.lateness.record(call.sent_s - call.due_s)
        ttft_s = call.first_s - call.due_s if call.first_s else 0.0
        due_s = call.due_s - self._start_s
        result.points.append(Point(due_s, ttft_s, call.end_s - call.due_s, call.surface, call.code))
        second = self._second(call.end_s)
        if call.code == OK:
            second.ok += 1
            second.good += call.is_good(self._scenario.slo)
            second.tokens += call.num_tokens
        elif call.code == LEFT:
            second.left += 1
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
