"""Owns `degas bench serve`: the same weights behind several servers, short streamed requests, turn about. Main thread.

Closed loop: a fixed number of requests is kept in flight, then the last ones have a grace time. A request unfinished after
it counts as such, its wait so far as a lower bound of its time to first text. A server whose turn it is not is stopped,
except Degas, whose processes watch each other.
"""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from loadtest.calls import OK, Call, Tally
from loadtest.comparison import figure, median, median_ratio, quicker, rounded, times, turns
from loadtest.peers.catalog import SHAPES, not_compared
from loadtest.peers.completions import build_body, complete
from loadtest.peers.engine_bench import Say, check_cores, write_gguf
from loadtest.peers.process import PeerError, free_port
from loadtest.peers.servers import CONTINUOUS_SERVE, TRANSFORMERS_SERVE, Place, RunningServer, Server
from loadtest.scenarios import Slo
from loadtest.tables import Figures

READY_TIMEOUT_S: Final = 180.0
REQUEST_TIMEOUT_S: Final = 60.0
UNFINISHED: Final = "unfinished"
"""The code of a request that was still under way when its turn was over: slow, but not refused."""
PAUSE_AFTER_FAILURE_S: Final = 0.01
FIRST_REQUEST_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """What every server is sent."""

    shape: str = "30m"
    in_flight: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 32
    new_tokens: int = 16
    seconds: float = 8.0  # of sending
    grace_s: float = 20.0  # for the last requests to end
    rounds: int = 3
    threads: int = 1
    cores: tuple[int, ...] = ()  # empty: any

    def check(self) -> None:
        """Raise ValueError naming the option and a safe value."""
        if self.shape not in SHAPES:
            raise ValueError(f"--shape is {self.shape!r}; it is one of {', '.join(SHAPES)}")
        for option, value, low, high in (
            ("--in-flight", min(self.in_flight, default=0), 1, 512),
            ("--in-flight", max(self.in_flight, default=0), 1, 512),
            ("--prompt-tokens", self.prompt_tokens, 1, 1024),
            ("--new-tokens", self.new_tokens, 1, 128),
            ("--seconds", self.seconds, 0.1, 600),
            ("--grace", self.grace_s, 0, 600),
            ("--rounds", self.rounds, 1, 1000),
            ("--threads", self.threads, 1, 256),
        ):
            if not low <= value <= high:
                raise ValueError(f"{option} must be between {low:g} and {high:g}, not {value:g}")
        check_cores(self.cores)


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's turn. Latencies in milliseconds, None where nothing was answered."""

    answered: int
    failures: dict[str, int]
    requests_per_s: float  # answered well, over the time to the last end of a request
    first_p50_ms: float | None
    first_p99_ms: float | None
    total_p50_ms: float | None
    cpu_ms: float | None  # of the server's processes, a request

    @property
    def per_cpu_s(self) -> float | None:
        """Requests a CPU second of the server's."""
        return 1e3 / self.cpu_ms if self.cpu_ms else None


def turn_from(tally: Tally, elapsed_s: float, cpu_s: float) -> Turn:
    """Add up one turn."""
    known = len(tally.ttft) > 0
    return Turn(
        tally.ok,
        dict(tally.errors),
        tally.ok / elapsed_s if elapsed_s > 0 else 0.0,
        tally.ttft.percentile_ms(50) if known else None,
        tally.ttft.percentile_ms(99) if known else None,
        tally.total.percentile_ms(50) if known else None,
        cpu_s * 1e3 / tally.ok if tally.ok and cpu_s else None,
    )


@dataclass(slots=True)
class Comparison:
    """Every turn at every number in flight, and a line for each server that is missing."""

    load: Load
    parameters: int = 0
    servers: list[str] = field(default_factory=list)
    rounds: dict[int, list[dict[str, Turn]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def figures(self) -> list[dict[str, Any]]:
        """A line for each number in flight and server; ratios are to the quicker `transformers serve`."""
        lines = []
        for in_flight, rounds in self.rounds.items():
            for name in self.servers:
                done = [one[name] for one in rounds if name in one]
                if done:
                    lines.append(self._figures(in_flight, name, rounds, done))
        return lines

    def _figures(
        self, in_flight: int, name: str, rounds: list[dict[str, Turn]], done: list[Turn]
    ) -> dict[str, Any]:
        best = quicker(rounds, (TRANSFORMERS_SERVE, CONTINUOUS_SERVE), lambda turn: turn.requests_per_s)

        def ratio(of: Callable[[Turn], float | None]) -> float | None:
            return median_ratio(rounds, name, best, of)

        return rounded(
            {
                "in_flight": in_flight,
                "server": name,
                "reference": best,
                "rounds": len(done),
                "requests_per_s": median(turn.requests_per_s for turn in done),
                "ratio": ratio(lambda turn: turn.requests_per_s),
                "cpu_ms_per_request": median(turn.cpu_ms for turn in done),
                "cpu_ratio": ratio(lambda turn: turn.per_cpu_s),
                "first_p50_ms": median(turn.first_p50_ms for turn in done),
                "first_p50_ratio": ratio(lambda turn: turn.first_p50_ms),
                "first_p99_ms": median(turn.first_p99_ms for turn in done),
                "total_p50_ms": median(turn.total_p50_ms for turn in done),
                "answered": sum(turn.answered for turn in done),
                "failures": _added(done),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "load": asdict(self.load),
            "parameters": self.parameters,
            "figures": self.figures(),
            "turns": [
                {"in_flight": in_flight, "server": name, "round": index, **rounded(asdict(turn))}
                for in_flight, rounds in self.rounds.items()
                for index, one in enumerate(rounds)
                for name, turn in one.items()
            ],
            "left_out": self.left_out,
        }

    def table(self) -> Figures:
        """For the terminal."""
        load = self.load
        table = Figures(
            f"{load.shape} Llama ({self.parameters / 1e6:.0f}M, bfloat16) over HTTP: {load.prompt_tokens} tokens "
            f"in, {load.new_tokens} out, threads: {load.threads}, rounds in turns: {load.rounds}",
            ("at", "server", "req/s", "×", "×cpu", "first p50", "×", "p99", "failed"),
            caption="×: to the quicker form of transformers serve in the same round, the median; ×cpu: requests per CPU second of the "
            "server; first: time to the first text in ms; at: requests in flight; (cb): --continuous-batching",
            left=("server",),
        )
        for line in self.figures():
            table.add(
                str(line["in_flight"]),
                line["server"],
                figure(line["requests_per_s"], 1),
                times(line["ratio"]),
                times(line["cpu_ratio"]),
                figure(line["first_p50_ms"]),
                times(line["first_p50_ratio"]),
                figure(line["first_p99_ms"]),
                ", ".join(f"{count} {code}" for code, count in line["failures"].items()) or "0",
            )
        return table


def _added(done: list[Turn]) -> dict[str, int]:
    found: dict[str, int] = {}
    for turn in done:
        for code, count in turn.failures.items():
            found[code] = found.get(code, 0) + count
    return found


async def run_turn(
    running: RunningServer, load: Load, in_flight: int, prompts: list[str], seconds: float, grace_s: float
) -> Turn:
    """Keep `in_flight` requests under way for so many seconds, then let them end; prompts are taken in turn."""
    tally = Tally(Slo())
    cpu_before_s, start_s = running.cpu_s(), time.perf_counter()
    last_end_s = start_s
    bodies = (build_body(running.model, prompt, load.new_tokens) for prompt in _cycle(prompts))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)

    async def one_after_another(session: aiohttp.ClientSession) -> None:
        nonlocal last_end_s
        while True:  # at least one request, however late this task starts
            now_s = time.perf_counter()
            call = Call("completions", now_s)
            try:
                await complete(session, running.url, call, next(bodies), load.new_tokens, REQUEST_TIMEOUT_S)
            finally:
                call.on_end(time.perf_counter(), UNFINISHED)  # unless it has ended
                tally.on_call(call)
                last_end_s = max(last_end_s, call.end_s)
                if call.code == UNFINISHED:
                    tally.ttft.record((call.first_s or call.end_s) - now_s)
            if call.code != OK:
                # Pause, so that a server that refuses at once is not flooded.
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
            if time.perf_counter() >= start_s + seconds:
                return

    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        tasks = [asyncio.create_task(one_after_another(session)) for _ in range(in_flight)]
        try:
            await asyncio.wait(tasks, timeout=seconds + grace_s)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
    for one in ended:
        if isinstance(one, Exception):
            raise one  # a fault of this client, not of the server
    return turn_from(tally, last_end_s - start_s, running.cpu_s() - cpu_before_s)


async def send_one(running: RunningServer, load: Load) -> Turn:
    """One request, with time enough for a server that is still warming up."""
    return await run_turn(running, load, 1, ["warmup" * 4], 0.0, FIRST_REQUEST_S)


def _cycle(prompts: list[str]) -> Any:
    while True:
        yield from prompts


def _start(
    comparison: Comparison, servers: list[Server], folder: Path, home: Path, stack: ExitStack, say: Say
) -> dict[str, RunningServer]:
    """Start every server in turn, send each a first request, and leave it paused."""
    load = comparison.load
    up: dict[str, RunningServer] = {}
    gguf = ""
    for server in servers:
        say(f"starting {server.name}")
        scratch = home / f"server-{len(up)}-{len(comparison.left_out)}"
        scratch.mkdir()
        try:
            if server.needs_gguf and not gguf:
                gguf = write_gguf(server.python, folder, home)
            place = Place(folder, gguf, scratch, free_port(), load.threads, max(load.in_flight))
            running = RunningServer(server, place, list(load.cores), READY_TIMEOUT_S)
            stack.enter_context(running)
            first = asyncio.run(send_one(running, load))
            if not first.answered:
                running.stop()
                raise PeerError(f"its first request failed: {first.failures}")
        except PeerError as error:
            line = not_compared(server.name, str(error))
            comparison.left_out.append(line)
            say(line)
            continue
        up[server.name] = running
        comparison.servers.append(server.name)
        _pause(running)
    return up


def _pause(running: RunningServer) -> None:
    if running.server.can_pause:
        running.signal(signal.SIGSTOP)


def measure(
    load: Load, servers: list[Server], left_out: list[str], say: Say = lambda line: None
) -> Comparison:
    """Every server's turns at each number in flight. Raises ValueError for a load out of bounds.

    A server that cannot be started is a line in `left_out`; one that fails requests shows it in its figures.
    """
    from loadtest.peers.checkpoint import random_text, write_checkpoint

    load.check()
    comparison = Comparison(load, left_out=list(left_out))
    rng = random.Random(2)
    with tempfile.TemporaryDirectory(prefix="degas-servers-") as name, ExitStack() as stack:
        home = Path(name)
        folder = home / "checkpoint"
        say(f"writing a random {load.shape} checkpoint")
        comparison.parameters = write_checkpoint(folder, load.shape)
        up = _start(comparison, servers, folder, home, stack, say)
        for in_flight in load.in_flight:
            rounds = comparison.rounds.setdefault(in_flight, [])
            for order in turns(list(up), load.rounds):
                say(f"{in_flight} in flight, round {len(rounds) + 1} of {load.rounds}")
                # Enough prompts that none comes twice in a turn, because prefix caches are not compared.
                prompts = [random_text(rng, load.prompt_tokens) for _ in range(20_000)]
                rounds.append(play_round(comparison, up, order, in_flight, prompts, say))
    return comparison


def play_round(
    comparison: Comparison,
    up: dict[str, RunningServer],
    order: list[str],
    in_flight: int,
    prompts: list[str],
    say: Say,
) -> dict[str, Turn]:
    """Each server's turn while the others are stopped. A server that answers nothing is ended and taken out of `up`."""
    done: dict[str, Turn] = {}
    for name in order:
        running = up.get(name)
        if running is None:
            continue
        running.signal(signal.SIGCONT)
        load = comparison.load
        # First send one request that is not counted: when it is answered, requests of an earlier turn are over.
        turn = asyncio.run(send_one(running, load))
        if turn.answered:
            turn = asyncio.run(run_turn(running, load, in_flight, prompts, load.seconds, load.grace_s))
        done[name] = turn
        if turn.answered:
            _pause(running)
            continue
        running.stop()
        del up[name]
        line = f"{name}: stopped at {in_flight} in flight: it answered nothing ({turn.failures})"
        comparison.left_out.append(line)
        say(line)
    return done
