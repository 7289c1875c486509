"""Owns what a load test asks for and when: the scenario, its bounds and its seeded plan. No clock, no sockets."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlsplit

SURFACES: Final = {
    "sse": ("query", "chat"),
    "ws": ("responses",),
    "both": ("query", "responses", "chat", "responses"),
}
"""The interfaces each transport stands for, taken in turn: `both` sends every second request by WebSocket."""

KINDS: Final = ("short", "chat", "bursts", "long", "structured", "cancels", "slow", "mixed")
"""What `degas loadtest` has a command for."""

MIX: Final = {"short": 40, "chat": 20, "long": 10, "structured": 10, "cancels": 10, "slow": 10}
"""How many of a hundred requests of `mixed` are of which kind."""

MAX_SECONDS: Final = 3600.0
MAX_REQUESTS: Final = 1_000_000
MAX_RATE: Final = 20_000.0
MAX_IN_FLIGHT: Final = 8_192
MAX_PROCESSES: Final = 64


class ScenarioError(ValueError):
    """A scenario that must not run; the message names the option and a safe value."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must meet to count as good. A zero means the figure is not looked at."""

    ttft_ms: float = 500.0
    gap_ms: float = 0.0
    total_ms: float = 2000.0


@dataclass(frozen=True, slots=True)
class Target:
    """What the server said about the model that is asked; the default is a vision-language model of Degas."""

    is_degas: bool = True
    family: str = ""
    takes_images: bool = True
    surfaces: tuple[str, ...] = ("query", "chat", "responses")  # what the model answers
    context_tokens: int = 0  # 0: not said
    tokens_per_word: float = 0.0  # of the load test's own words, by a trial request; 0: not tried
    price_per_hour: float = 0.0  # of all its devices together, by its metrics; 0: not said


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load test, bounded in count and in time. Open loop unless `in_flight` is set."""

    url: str = "http://127.0.0.1:8080"
    kind: str = "short"  # one of `KINDS`
    transport: str = "both"
    rate: float = 10.0  # arrivals a second, open loop
    seconds: float = 10.0
    max_requests: int = 100_000
    in_flight: int = 0  # above 0: closed loop with this many at once; `rate` is then unused
    seed: int = 0
    processes: int = 1
    shard: int = 0  # which of the processes this is
    pictures: int = 8
    picture_px: int = 128
    picture_height_px: int = 0  # 0: as the width
    min_tokens: int = 3
    max_tokens: int = 16
    turns: int = 4  # of a conversation of the kind `chat`
    think_s: float = 0.2  # between an answer and the next turn
    burst: int = 16  # requests that arrive at once, of the kind `bursts`
    prompt_tokens: int = 0  # of the kind `long`; 0: what fits, at most 2000
    salt: str = ""  # begins every long prompt, so that no earlier run's prompts are in a cache
    slow_share: float = 0.25  # clients that read slowly, of the kind `slow`
    pause_s: float = 0.5  # between two reads of a slow client
    connections: int = 4  # WebSocket connections that the lanes share
    warmup_requests: int = 0
    ready_s: float = 60.0  # a warm-up waits this long for the server to be ready, then fails
    request_timeout_s: float = 30.0
    grace_s: float = 30.0  # how long to wait for what is outstanding when arrivals end
    model: str | None = None
    target: Target = Target()
    price_per_hour: float = 0.0  # of the target's devices together; 0: what its metrics say
    api_key: str | None = field(default=None, repr=False)
    slo: Slo = Slo()
    i_own_this_host: bool = False

    @property
    def is_open_loop(self) -> bool:
        """Whether arrivals keep coming whatever the server does."""
        return self.in_flight == 0

    @property
    def base_url(self) -> str:
        """The address without a path, whether `/v1` was written behind it or not."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def surfaces(self) -> tuple[str, ...]:
        """The interfaces that are asked in turn: those of the transport that the model answers."""
        asked = SURFACES[self.transport]
        if "completions" in self.target.surfaces and self.transport != "ws":
            asked = (*asked, "completions")
        found = tuple(name for name in asked if name in self.target.surfaces)
        return found if "query" in found else tuple(dict.fromkeys(found))  # half by WebSocket in either case

    def check(self) -> None:
        """Raise `ScenarioError` unless this is bounded and aimed at a host that may be loaded."""
        if self.transport not in SURFACES:
            raise ScenarioError(f"--transport must be one of {', '.join(SURFACES)}, not {self.transport!r}")
        if self.kind not in KINDS:
            raise ScenarioError(f"the scenario must be one of {', '.join(KINDS)}, not {self.kind!r}")
        _check_between("--seconds", self.seconds, 0.05, MAX_SECONDS)
        _check_between("--max-requests", self.max_requests, 1, MAX_REQUESTS)
        _check_between("--in-flight", self.in_flight, 0, MAX_IN_FLIGHT)
        if self.is_open_loop:
            _check_between("--rate", self.rate, 0.01, MAX_RATE)
        elif self.kind == "bursts":
            raise ScenarioError("--in-flight: bursts arrive by the clock; leave it at 0")
        _check_between("--processes", self.processes, 1, MAX_PROCESSES)
        if 0 < self.in_flight < self.processes or self.max_requests < self.processes:
            raise ScenarioError("--processes: at most as many as --in-flight and --max-requests")
        _check_between("--pictures", self.pictures, 1, 1024)
        _check_between("--picture-px", self.picture_px, 32, 1024)
        if self.picture_height_px:
            _check_between("--picture-height-px", self.picture_height_px, 32, self.picture_px)
        _check_between("--connections", self.connections, 1, 256)
        _check_between("--min-tokens", self.min_tokens, 1, 4096)
        _check_between("--max-tokens", self.max_tokens, self.min_tokens, 4096)
        _check_between("--turns", self.turns, 1, 64)
        _check_between("--think-s", self.think_s, 0, 60)
        _check_between("--burst", self.burst, 1, 4096)
        _check_between("--prompt-tokens", self.prompt_tokens, 0, 1_000_000)
        _check_between("--slow-share", self.slow_share, 0, 1)
        _check_between("--pause-s", self.pause_s, 0.01, 60)
        _check_between("--price-per-hour", self.price_per_hour, 0, 1e9)
        _check_between("--ready-s", self.ready_s, 0.05, 3600)
        _check_between("--timeout", self.request_timeout_s, 0.05, 600)
        check_target(self.url, i_own_this_host=self.i_own_this_host)

    def shares(self) -> list[Scenario]:
        """One scenario for each process; together they offer what this one does."""
        count = self.processes
        return [
            replace(
                self,
                shard=index,
                rate=self.rate / count,
                max_requests=_part(self.max_requests, count, index),
                in_flight=_part(self.in_flight, count, index),
                warmup_requests=0,
            )
            for index in range(count)
        ]

    def public(self) -> dict[str, Any]:
        """The scenario as it may be written to a report: everything but the key."""
        values = asdict(self)
        del values["api_key"]
        return values


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of the plan. `due_s` counts from the start of the arrivals; 0 in a closed loop."""

    index: int
    due_s: float
    surface: str  # query | chat | responses | completions
    picture: int
    question: int  # seeds what is asked
    max_tokens: int
    kind: str = "short"  # short | chat | long | structured | cancels | slow
    leave_after: int = 0  # pieces of output after which the client goes away; 0: it stays


def plan(scenario: Scenario) -> Iterator[Planned]:
    """The requests of a scenario in order of arrival: Poisson arrivals, and equal for equal seeds."""
    rng = random.Random(scenario.seed if scenario.shard == 0 else f"{scenario.seed}/{scenario.shard}")
    surfaces = scenario.surfaces
    due_s = 0.0
    for index in range(scenario.max_requests):
        if scenario.is_open_loop:
            due_s += _next_s(scenario, index, rng)
            if due_s >= scenario.seconds:
                return
        planned = Planned(
            index=index,
            due_s=due_s,
            surface=surfaces[index % len(surfaces)],
            picture=rng.randrange(scenario.pictures),
            question=rng.randrange(1 << 16),
            max_tokens=rng.randint(scenario.min_tokens, scenario.max_tokens),
        )
        yield _with_kind(planned, scenario, rng)


def _next_s(scenario: Scenario, index: int, rng: random.Random) -> float:
    """Until the next arrival. Of bursts, all requests of one arrive at once, and bursts at random."""
    if scenario.kind != "bursts":
        return rng.expovariate(scenario.rate)
    # Every process sends its part of every burst, so the bursts' times come from the seed that all share.
    size = max(1, scenario.burst // scenario.processes)
    if index % size:
        return 0.0
    shared = random.Random(f"{scenario.seed}/burst/{index // size}")
    return 0.0 if index == 0 else shared.expovariate(scenario.rate / size)


def _with_kind(planned: Planned, scenario: Scenario, rng: random.Random) -> Planned:
    kind = scenario.kind
    if kind == "bursts":
        kind = "short"
    elif kind == "slow":
        kind = "slow" if rng.random() < scenario.slow_share else "short"
    elif kind == "mixed":
        kind = rng.choices(tuple(MIX), weights=tuple(MIX.values()))[0]
    if kind == "short":
        return planned
    surface = planned.surface
    if kind in ("slow", "structured", "chat") and surface == "query":
        surface = "chat"  # Moondream's question has no turns and no schema
    if kind == "slow" and surface == "responses":  # a slow reader has a connection of its own
        surface = next((name for name in scenario.target.surfaces if name not in ("query", surface)), "chat")
    leave_after = rng.randint(1, max(1, planned.max_tokens // 2)) if kind == "cancels" else 0
    return replace(planned, kind=kind, surface=surface, leave_after=leave_after)


def check_target(url: str, *, i_own_this_host: bool) -> None:
    """Raise `ScenarioError` for anything but http(s) to this machine, unless its owner says otherwise."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ScenarioError(f"--url must look like http://127.0.0.1:8080, not {url!r}")
    if i_own_this_host or parts.hostname == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ScenarioError(
            f"{parts.hostname} is not this machine; a load test can take a server down. "
            "Say --i-own-this-host if it is yours to load."
        )


def _part(number: int, count: int, index: int) -> int:
    """The share of `number` that the process `index` of `count` has; the shares add up."""
    return number // count + (index < number % count)


def _check_between(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ScenarioError(f"{option} must be between {low:g} and {high:g}, not {value:g}")
