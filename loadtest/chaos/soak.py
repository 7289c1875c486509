"""Owns `degas soak`: mixed traffic for hours against a server that is hurt again and again. Main thread, one asyncio loop.

The server is `degas serve` with two gateways, as a stranger would start it. Traffic comes in legs of some minutes, each a load
test of the kind `mixed` (conversations, long prompts, schemas, clients that leave, clients that read slowly); in each leg one
process or two are killed or stopped. Between legs nothing is asked, so that whatever is left behind shows.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from loadtest.bench.chaos import FLAGS
from loadtest.bench.chaos_client import until
from loadtest.bench.chaos_server import Server, serving
from loadtest.calls import LEFT, OK
from loadtest.chaos.lives import Lives
from loadtest.chaos.readings import HELPERS, Reading, read
from loadtest.client import Result, run
from loadtest.scenarios import Scenario
from loadtest.target import fit

LEG_S: Final = 120.0
"""All legs ask the same, and each gateway gets a random part of it: after five legs its caches have seen nearly all."""

MIN_LEG_S: Final = 8.0
SAMPLE_S: Final = 2.0
REST_S: Final = 20.0  # how long a server may take to put everything away
BACK_S: Final = 60.0  # how long a process may take to be back
LONG_RUN_S: Final = 1800.0
HURT_SHARE: Final = 0.4
AFTER_S: Final = 3.0  # a worker that is back has to be found by every gateway
SKEW_S: Final = 1.0  # by how much a client may have begun later than it should: its points count from then
LEAD_S: Final = 0.5  # between the plan of a leg and its first request
BLOWS: Final = (("worker", "SIGKILL"), ("gateway", "SIGKILL"), ("worker", "SIGSTOP"))
"""Who is hurt, and how, in turn. The last of several gateways is meant: the first lives from beginning to end."""

EXPLAINED: Final = frozenset(
    {"worker_lost", "server_error", "loading", "disconnected", "truncated", "connection_refused", "timeout"}
)
"""Errors that a blow explains, of requests whose life it met. Over the Responses interface a lost worker is a `server_error`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done. `seconds` are those of traffic."""

    model: str = "sim"
    seconds: float = 7200.0
    rate: float = 10.0  # arrivals a second
    blow_every_s: float = 300.0  # 0: nobody is hurt
    gateways: int = 2
    seed: int = 1
    max_tokens: int = 32

    def check(self) -> None:
        """Raises ValueError, naming the field and a value that would work."""
        if self.model not in FLAGS:
            raise ValueError(f"model is {self.model!r}; {' or '.join(FLAGS)} would work")
        bounds = {
            "seconds": (MIN_LEG_S, 30 * 86400, 7200),
            "rate": (0.1, 1000, 10),
            "gateways": (1, 16, 2),
            "max_tokens": (1, 4096, 32),
        }
        for name, (low, high, safe) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value:g}; {low:g} to {high:g} would work, such as {safe}")
        if self.blow_every_s and self.blow_every_s < 2:
            raise ValueError(
                f"blow_every_s is {self.blow_every_s:g}; 0 (nobody is hurt) or 2 and more would work"
            )

    @property
    def legs(self) -> int:
        """How many stretches of equal length."""
        return max(math.ceil(self.seconds / LEG_S), min(4, int(self.seconds / MIN_LEG_S)))

    @property
    def warm_up_s(self) -> float:
        """Of every life, before its memory counts."""
        return min(600.0, self.seconds / 6)

    @property
    def hurt_until_s(self) -> float:
        """Of a long run nobody is hurt in the last part, so that everybody's memory is seen over one long life."""
        return self.seconds * HURT_SHARE if self.seconds >= LONG_RUN_S else self.seconds


@dataclass(slots=True)
class Blow:
    """One process hurt; times of `time.perf_counter`."""

    post: str
    signal: str
    at_s: float
    back_s: float = 0.0  # another process serves in its place; 0: it never did

    @property
    def took_s(self) -> float:
        """Until it was replaced."""
        return self.back_s - self.at_s if self.back_s else float("inf")

    def met(self, due_s: float, end_s: float) -> bool:
        """Whether a request was under way, or came, between the blow and a moment after its end."""
        return due_s <= (self.back_s or float("inf")) + AFTER_S and end_s >= self.at_s - SKEW_S


@dataclass(slots=True)
class Leg:
    """One stretch of traffic."""

    at_s: float  # when its arrivals began, since the soak's beginning
    sent: int
    ok: int
    left: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    errors: Counter[str] = field(default_factory=Counter)
    unexplained: Counter[str] = field(default_factory=Counter)
    first_errors: dict[str, str] = field(default_factory=dict)
    rest: Reading | None = None  # at rest, afterwards; None: it did not come to rest
    stopped: str | None = None

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        counters = {name: dict(getattr(self, name)) for name in ("errors", "unexplained", "first_errors")}
        numbers = {
            name: round(getattr(self, name), 3)
            for name in ("at_s", "sent", "ok", "left", "ttft_p50_ms", "ttft_p99_ms")
        }
        pages = self.rest.pages if self.rest is not None else None
        return {**numbers, **counters, "pages_at_rest": pages, "stopped": self.stopped}


@dataclass(slots=True)
class Soaked:
    """Everything that was seen."""

    plan: Plan
    before: Reading
    lives: Lives = field(default_factory=Lives)
    legs: list[Leg] = field(default_factory=list)
    blows: list[Blow] = field(default_factory=list)
    most_pages: int = 0
    most_descriptors: dict[str, int] = field(default_factory=dict)
    other_deaths: int = 0
    endings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def on_reading(self, reading: Reading) -> None:
        """One sample."""
        self.most_pages = max(self.most_pages, reading.pages)
        for post, held in reading.posts.items():
            self.lives.on_sample(post, held.key, reading.at_s, held.num_bytes)
            self.most_descriptors[post] = max(self.most_descriptors.get(post, 0), held.descriptors)


Say = Callable[[str], None]


def soak(plan: Plan, say: Say = lambda line: None) -> Soaked:
    """Start a server, soak it, end it. Raises ValueError for a plan that cannot be run, and RuntimeError where the server
    does not start or never rests. SIGINT and SIGTERM end the traffic early; what was seen until then is reported."""
    plan.check()
    flags = [*FLAGS[plan.model], "--gateways", str(plan.gateways)]
    with serving(flags) as server:
        return asyncio.run(_soak(server, plan, say))


async def _soak(server: Server, plan: Plan, say: Say) -> Soaked:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    scenario = await fit(
        Scenario(
            url=server.url, kind="mixed", rate=plan.rate, seconds=max(MIN_LEG_S, plan.seconds / plan.legs),
            max_requests=1_000_000, max_tokens=plan.max_tokens, min_tokens=min(3, plan.max_tokens), seed=plan.seed,
            grace_s=30.0, salt=f"{time.time_ns():x}",
        )
    )  # fmt: skip
    # Pools, caches and the processes that are started on first need reach their size.
    await run(replace(scenario, seconds=2.0, rate=20.0, seed=plan.seed + 1000), stop=stop)
    before = await _at_rest(server)
    if before is None:
        raise RuntimeError(
            "the server does not come to rest after its warm-up: " + "; ".join(server.endings())
        )
    soaked = Soaked(plan, before)
    watching = asyncio.create_task(_watch(server, soaked))
    begun_s = time.perf_counter()
    try:
        for _ in range(plan.legs):
            if stop.is_set():
                break
            soaked.legs.append(await _leg(server, soaked, scenario, begun_s, stop))
            say(_progress(soaked))
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    soaked.seconds = time.perf_counter() - begun_s
    hurt_workers = sum(blow.post == "worker" for blow in soaked.blows)
    soaked.other_deaths = server.deaths() - hurt_workers
    soaked.endings = server.endings()
    return soaked


async def _leg(
    server: Server, soaked: Soaked, scenario: Scenario, begun_s: float, stop: asyncio.Event
) -> Leg:
    start_s = time.perf_counter() + LEAD_S
    running = asyncio.create_task(run(scenario, stop=stop, start_at_s=time.time() + LEAD_S))
    num_before = len(soaked.blows)
    hurting = asyncio.create_task(_hurt(server, soaked, begun_s, start_s + scenario.seconds))
    try:
        result = await running
    finally:
        running.cancel()
        # A blow that has fallen is seen through: what comes back is part of the leg.
        if len(soaked.blows) == num_before or soaked.blows[-1].back_s or stop.is_set():
            hurting.cancel()
        await asyncio.gather(hurting, return_exceptions=True)
    if not hurting.cancelled() and (fault := hurting.exception()) is not None:
        raise fault
    return leg_of(result, soaked.blows[num_before:], start_s, begun_s, await _at_rest(server))


def leg_of(result: Result, blows: list[Blow], start_s: float, begun_s: float, rest: Reading | None) -> Leg:
    """What a leg's result says, errors held against the leg's blows."""
    errors: Counter[str] = Counter()
    unexplained: Counter[str] = Counter()
    for point in result.points:
        if point.code in (OK, LEFT):
            continue
        errors[point.code] += 1
        due_s, end_s = start_s + point.due_s, start_s + point.due_s + point.total_s
        was_met = point.code in EXPLAINED and any(blow.met(due_s, end_s) for blow in blows)
        if not was_met:
            unexplained[point.code] += 1
    slow = result.kinds.get("slow")
    for code, count in slow.errors.items() if slow is not None else ():  # they have no points
        errors[code] += count
        if not (code in EXPLAINED and blows):
            unexplained[code] += count
    return Leg(
        at_s=start_s - begun_s,
        sent=result.all.sent + (slow.sent if slow is not None else 0),
        ok=result.all.ok + (slow.ok if slow is not None else 0),
        left=result.all.left,
        ttft_p50_ms=result.all.ttft.percentile_ms(50),
        ttft_p99_ms=result.all.ttft.percentile_ms(99),
        errors=errors,
        unexplained=unexplained,
        first_errors=dict(result.all.first_errors),
        rest=rest,
        stopped=result.stopped,
    )


async def _hurt(server: Server, soaked: Soaked, begun_s: float, until_s: float) -> None:
    """The blows that are due before the leg ends, one after the other."""
    plan = soaked.plan
    while plan.blow_every_s:
        due_s = begun_s + (len(soaked.blows) + 1) * plan.blow_every_s
        if due_s > min(until_s - 2.0, begun_s + plan.hurt_until_s):  # the next leg's, or none
            return
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        role, name = BLOWS[len(soaked.blows) % len(BLOWS)]
        post = f"gateway-{plan.gateways}" if role == "gateway" and plan.gateways > 1 else role
        await _strike(server, soaked, post, name)


async def _strike(server: Server, soaked: Soaked, post: str, name: str) -> None:
    if not await until(lambda: server.pid_of(post) is not None, BACK_S):
        raise RuntimeError(f"{post} is gone and does not come back: " + "; ".join(server.endings()[-3:]))
    pid = server.pid_of(post)
    blow = Blow(post, name, time.perf_counter())
    soaked.blows.append(blow)
    if pid is None:
        return
    try:
        os.kill(pid, signal.Signals[name])
    except ProcessLookupError:
        return
    if await until(lambda: server.pid_of(post) not in (None, pid), BACK_S):
        blow.back_s = time.perf_counter()


async def _watch(server: Server, soaked: Soaked) -> None:
    while True:
        soaked.on_reading(await asyncio.to_thread(read, server))
        await asyncio.sleep(SAMPLE_S)


async def _at_rest(server: Server) -> Reading | None:
    """A reading with nothing under way, twice the same; None where that does not come in time."""
    last: Reading | None = None
    end_s = time.perf_counter() + REST_S
    while time.perf_counter() < end_s:
        await asyncio.sleep(0.5)
        reading = await asyncio.to_thread(read, server)
        held = {post: one.descriptors for post, one in reading.posts.items() if post != HELPERS}
        if reading.is_calm and last is not None and reading.pages == last.pages:
            before = {post: one.descriptors for post, one in last.posts.items() if post != HELPERS}
            if held == before:
                return reading
        last = reading if reading.is_calm else None
    return None


def _progress(soaked: Soaked) -> str:
    leg = soaked.legs[-1]
    failed = leg.errors.total()
    unexplained = f", {leg.unexplained.total()} of them unexplained" if leg.unexplained else ""
    return (
        f"{leg.at_s / 60:.1f} min: {leg.sent} sent, {leg.ok} answered, {failed} failed{unexplained}; "
        f"first token p50 {leg.ttft_p50_ms:.1f} ms; {len(soaked.blows)} blows so far"
    )
