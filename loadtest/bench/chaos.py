"""Owns `degas bench chaos`: many clients, and a worker that is killed again and again. Main thread, one asyncio loop.

The table says whether each client that stayed got exactly one terminal event, and when; what became of the requests that
a kill met unstarted; how soon the server was ready again; and whether everything is back where it was.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from loadtest.bench.chaos_client import Asked, Clients, Habits, until
from loadtest.bench.chaos_server import Held, Readiness, Server, absence, serving
from loadtest.tables import Figures

TERMINAL_S: Final = 1.0
READY_S: Final = 3.0
SERVED_SHARE: Final = 0.99
SLOPE_BYTES_PER_S: Final = (
    1 << 20
)  # a gateway's first minute under load fills its caches; later it is a twentieth of this
FORGIVEN_KILLS: Final = 2
ANSWER_TIMEOUT_S: Final = 45.0
REST_TIMEOUT_S: Final = 20.0
AWAY_TIMEOUT_S: Final = 15.0
NOTICE_S: Final = {signal.SIGKILL: 2.0, signal.SIGSTOP: 10.0}
"""How soon the server must have noticed a blow."""

WARM_UP_S: Final = 2.0
FLAGS: Final = {
    "sim": ("--device", "sim", "--sim-profile", "rtx3090"),
    "pocket": ("--model", "pocket"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to the server."""

    model: str = "sim"
    clients: int = 200
    seconds: float = 40.0
    kill_every_s: float = 7.0
    stops: int = 1
    hang_up_share: float = 0.1
    tokens: int = 40
    seed: int = 1


@dataclass(slots=True)
class Blow:
    """One kill or stop of the worker; times of `time.perf_counter`."""

    signal: str
    at_s: float
    felt_s: float = 0.0  # when the server said that it is not ready; for a stop, that it had noticed
    ready_s: float = 0.0  # when it was ready again; 0: it never was
    terminal_s: list[float] = field(default_factory=list)  # from the blow to each begun stream's error
    unstarted: int = 0
    served: int = 0
    unserved: dict[str, int] = field(default_factory=dict)

    def count(self, asked: Iterable[Asked]) -> None:
        """Find what became of those that were under way."""
        for one in asked:
            if not one.stayed or not one.accepted or one.sent_s > self.at_s or 0 < one.end_s <= self.at_s:
                continue
            if 0 < one.first_s <= self.at_s:
                if one.code:
                    self.terminal_s.append(
                        one.end_s - (self.felt_s if self.signal == "SIGSTOP" else self.at_s)
                    )
            else:
                self.unstarted += 1
                if one.first_s or (one.num_terminal and not one.code):
                    self.served += 1
                else:
                    code = one.code or "no terminal event"
                    self.unserved[code] = self.unserved.get(code, 0) + 1

    @property
    def ready_again_s(self) -> float:
        """From the kill; for a stop from when it was noticed."""
        since_s = self.felt_s if self.signal == "SIGSTOP" else self.at_s
        return self.ready_s - since_s if self.ready_s else float("inf")


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """Everything that happened."""

    plan: Plan
    asked: int
    refused: int
    hung_up: int
    stayed: int
    exactly_one: int
    ended_well: int
    errors: dict[str, int]
    blows: list[Blow]
    before: Held
    after: Held
    other_deaths: int  # of workers, by nobody's hand
    endings: list[str]  # the supervisor's words
    slope_bytes_per_s: float
    seconds: float

    @property
    def kills(self) -> list[Blow]:
        """The blows that were kills."""
        return [blow for blow in self.blows if blow.signal == "SIGKILL"]

    @property
    def unstarted(self) -> int:
        """Requests that a blow met before their first token; one that met two counts twice."""
        return sum(blow.unstarted for blow in self.blows)

    @property
    def served(self) -> int:
        """Those of them that were served all the same."""
        return sum(blow.served for blow in self.blows)

    def promises(self) -> dict[str, bool]:
        """Each promise, and whether it was kept."""
        terminal_s = [seconds for blow in self.blows for seconds in blow.terminal_s]
        return {
            "one terminal event each": self.exactly_one == self.stayed,
            "begun streams are told within a second": max(terminal_s, default=0.0) <= TERMINAL_S,
            "unstarted requests are served": self.served >= SERVED_SHARE * self.unstarted,
            "nobody is quarantined": not self.errors.get("quarantined"),
            "ready again within 3 s": all(
                blow.ready_again_s <= READY_S for blow in self.blows[:FORGIVEN_KILLS]
            )
            and all(blow.ready_s for blow in self.blows),
            "everything at its baseline": self.before == self.after and not self.other_deaths,
            "memory does not grow": self.slope_bytes_per_s <= SLOPE_BYTES_PER_S,
        }

    @property
    def is_clean(self) -> bool:
        """Whether every promise was kept."""
        return all(self.promises().values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "ready_again_s": [round(blow.ready_again_s, 3) if blow.ready_s else None for blow in self.blows],
            "unstarted": self.unstarted,
            "served": self.served,
            "promises": self.promises(),
            "is_clean": self.is_clean,
        }

    def facts(self) -> dict[str, str]:
        """What was measured of each promise."""
        terminal_s = [seconds for blow in self.blows for seconds in blow.terminal_s]
        lost = sum((Counter(blow.unserved) for blow in self.blows), Counter())
        share = 100 * self.served / self.unstarted if self.unstarted else 100.0
        moved = {
            name: f"{value} → {asdict(self.after)[name]}"
            for name, value in asdict(self.before).items()
            if asdict(self.after)[name] != value
        }
        if self.other_deaths:
            moved["workers that died by nobody's hand"] = f"{self.other_deaths} ({'; '.join(self.endings)})"
        return {
            "one terminal event each": f"{self.exactly_one} of {self.stayed} requests whose client stayed ({self.hung_up} hung "
            f"up, {self.refused} were refused at the door); errors: {_counts(self.errors)}",
            "begun streams are told within a second": f"{len(terminal_s)} streams; {_spread(terminal_s)}",
            "unstarted requests are served": f"{self.served} of {self.unstarted} ({share:.1f} %); others: {_counts(lost)}",
            "nobody is quarantined": str(self.errors.get("quarantined", 0)),
            "ready again within 3 s": _spread([blow.ready_again_s for blow in self.blows])
            + "; "
            + ", ".join(f"{blow.signal[3:].lower()} {blow.ready_again_s:.2f}" for blow in self.blows),
            "everything at its baseline": ", ".join(f"{name} {value}" for name, value in moved.items())
            or f"{self.after.processes} processes, {self.after.gateway_descriptors} descriptors, 0 pages, 0 requests",
            "memory does not grow": f"gateway {self.slope_bytes_per_s / 1024:+.0f} KiB/s over the second half",
        }

    def table(self) -> Figures:
        """One line for each promise."""
        plan, facts = self.plan, self.facts()
        table = Figures(
            f"chaos: {plan.clients} clients for {plan.seconds:g} s, half SSE and half WebSocket, {plan.model}; "
            f"{len(self.kills)} kills, {len(self.blows) - len(self.kills)} stops",
            ("promise", "measured", "kept"),
            left=("promise", "measured"),
        )
        for name, kept in self.promises().items():
            table.add(name, facts[name], "yes" if kept else "NO")
        return table


def run_chaos(plan: Plan) -> ChaosReport:
    """Start a server, torment it, and report. Raises ValueError for a plan that cannot be run."""
    if plan.model not in FLAGS:
        raise ValueError(f"model is {plan.model!r}; {' or '.join(FLAGS)} would work")
    if not 1 <= plan.clients <= 2000:
        raise ValueError(f"clients is {plan.clients}; 1 to 2000 would work")
    if not 3 <= plan.seconds <= 3600:
        raise ValueError(f"seconds is {plan.seconds:g}; 3 to 3600 would work")
    with serving([*FLAGS[plan.model], "--max-queue", "4096", "--max-waiting", "2048"]) as server:
        return asyncio.run(_torment(server, plan))


async def _torment(server: Server, plan: Plan) -> ChaosReport:
    habits = Habits(plan.tokens, plan.hang_up_share, ANSWER_TIMEOUT_S)
    warm = Clients(server.url, plan.clients, Habits(4, 0.3, ANSWER_TIMEOUT_S), seed=plan.seed + 1)
    await warm.run(WARM_UP_S)  # so that pools and caches have reached their size
    before = await _at_rest(server, None)
    started_s = time.perf_counter()
    clients = Clients(server.url, plan.clients, habits, seed=plan.seed)
    memory: list[tuple[float, int]] = []
    readiness = Readiness(server.url)
    readiness.start()
    watching = asyncio.create_task(_watch_memory(server, memory))
    running = asyncio.create_task(clients.run(plan.seconds))
    blows: list[Blow] = []
    try:
        kinds = _schedule(plan)
        for number, kind in enumerate(kinds):
            due_s = started_s + (number + 1) * plan.kill_every_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            blow = await _strike(server, readiness, kind)
            if blow is not None:
                blows.append(blow)
        await running
    finally:
        clients.stop()
        running.cancel()
        watching.cancel()
        readiness.end()
        await asyncio.gather(running, watching, return_exceptions=True)
    after = await _at_rest(server, before)
    for blow in blows:
        blow.count(clients.asked)
    stayed = [asked for asked in clients.asked if asked.stayed]
    errors = Counter(asked.code or "none" for asked in stayed if asked.code or not asked.num_terminal)
    return ChaosReport(
        plan=plan,
        asked=len(clients.asked),
        refused=sum(not asked.accepted for asked in stayed),
        hung_up=len(clients.asked) - len(stayed),
        stayed=len(stayed),
        exactly_one=sum(asked.num_terminal == 1 and not asked.num_after for asked in stayed),
        ended_well=sum(asked.num_terminal == 1 and not asked.code for asked in stayed),
        errors=dict(errors.most_common()),
        blows=blows,
        before=before,
        after=after,
        other_deaths=server.deaths() - len(blows),
        endings=server.endings(),
        slope_bytes_per_s=_slope(memory[len(memory) // 2 :]),
        seconds=time.perf_counter() - started_s,
    )


def _schedule(plan: Plan) -> list[signal.Signals]:
    """As many blows as fit, the stops in the middle of them; the last leaves time to recover."""
    num = int((plan.seconds - 1) / plan.kill_every_s)
    num_stops = min(plan.stops, max(0, num - 1))
    kinds = [signal.SIGKILL] * (num - num_stops)
    return kinds[: len(kinds) // 2 + 1] + [signal.SIGSTOP] * num_stops + kinds[len(kinds) // 2 + 1 :]


async def _strike(server: Server, readiness: Readiness, kind: signal.Signals) -> Blow | None:
    """Send the serving worker a signal and wait until the server is ready again; None where there was none to send it to."""
    found: list[int] = []

    def serves() -> bool:
        pid = server.pid_of("worker")
        found[:] = [pid] if pid is not None else []
        return pid is not None

    if not await until(serves, AWAY_TIMEOUT_S):
        return None
    blow = Blow(kind.name, time.perf_counter())
    try:
        os.kill(found[0], kind)
    except ProcessLookupError:
        return None

    within_s = NOTICE_S[kind]
    seen: tuple[float, float] | None = None

    def is_back() -> bool:
        nonlocal seen
        seen = absence(readiness.answers, blow.at_s, within_s)
        return seen is not None and seen[1] > 0

    await until(is_back, within_s + AWAY_TIMEOUT_S)
    blow.felt_s, blow.ready_s = seen or (blow.at_s, 0.0)
    return blow


async def _at_rest(server: Server, wanted: Held | None) -> Held:
    """What the server holds once that has stopped changing, or is what is wanted."""
    last: Held | None = None
    end_s = time.perf_counter() + REST_TIMEOUT_S
    while True:
        await asyncio.sleep(1.0)
        try:
            held = await asyncio.to_thread(server.held)
        except (OSError, KeyError):
            held = None
        is_calm = held is not None and not (held.requests or held.running or held.zombies)
        if held is not None and is_calm and held == (last if wanted is None else wanted):
            return held
        if time.perf_counter() > end_s and held is not None:
            return held
        if time.perf_counter() > 2 * REST_TIMEOUT_S + end_s:
            raise RuntimeError("the server does not come to rest")
        last = held


async def _watch_memory(server: Server, memory: list[tuple[float, int]]) -> None:
    while True:
        num_bytes = server.gateway_bytes()
        if num_bytes:
            memory.append((time.perf_counter(), num_bytes))
        await asyncio.sleep(0.5)


def _slope(samples: Sequence[tuple[float, int]]) -> float:
    """Bytes a second, by least squares; 0 for fewer than three samples."""
    if len(samples) < 3:
        return 0.0
    return statistics.linear_regression(*zip(*samples, strict=True)).slope


def _spread(seconds: Sequence[float]) -> str:
    return f"median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s" if seconds else "none"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"
