"""Owns what a load test asks for and when: the scenario, its bounds and its seeded plan. No clock, no sockets."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

SURFACES: Final = {
    "sse": ("query", "chat"),
    "ws": ("responses",),
    "both": ("query", "responses", "chat", "responses"),
}
"""The interfaces each transport stands for, taken in turn: `both` sends every second request by WebSocket."""

MAX_SECONDS: Final = 3600.0
MAX_REQUESTS: Final = 1_000_000
MAX_RATE: Final = 20_000.0
MAX_IN_FLIGHT: Final = 8_192


class ScenarioError(ValueError):
    """A scenario that must not run; the message names the option and a safe value."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must meet to count as good. A zero means the figure is not looked at."""

    ttft_ms: float = 500.0
    gap_ms: float = 0.0
    total_ms: float = 2000.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load test, bounded in count and in time. Open loop unless `in_flight` is set."""

    url: str = "http://127.0.0.1:8080"
    transport: str = "both"
    rate: float = 10.0  # arrivals a second, open loop
    seconds: float = 10.0
    max_requests: int = 100_000
    in_flight: int = 0  # above 0: closed loop with this many at once; `rate` is then unused
    seed: int = 0
    pictures: int = 8
    picture_px: int = 128
    picture_height_px: int = 0  # 0: as the width
    min_tokens: int = 3
    max_tokens: int = 16
    connections: int = 4  # WebSocket connections that the lanes share
    warmup_requests: int = 0
    ready_s: float = 60.0  # a warm-up waits this long for the server to be ready, then fails
    request_timeout_s: float = 30.0
    grace_s: float = 30.0  # how long to wait for what is outstanding when arrivals end
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    slo: Slo = Slo()
    i_own_this_host: bool = False

    @property
    def is_open_loop(self) -> bool:
        """Whether arrivals keep coming whatever the server does."""
        return self.in_flight == 0

    def check(self) -> None:
        """Raise `ScenarioError` unless this is bounded and aimed at a host that may be loaded."""
        if self.transport not in SURFACES:
            raise ScenarioError(f"--transport must be one of {', '.join(SURFACES)}, not {self.transport!r}")
        _check_between("--seconds", self.seconds, 0.05, MAX_SECONDS)
        _check_between("--max-requests", self.max_requests, 1, MAX_REQUESTS)
        _check_between("--in-flight", self.in_flight, 0, MAX_IN_FLIGHT)
        if self.is_open_loop:
            _check_between("--rate", self.rate, 0.01, MAX_RATE)
        _check_between("--pictures", self.pictures, 1, 1024)
        _check_between("--picture-px", self.picture_px, 32, 1024)
        if self.picture_height_px:
            _check_between("--picture-height-px", self.picture_height_px, 32, self.picture_px)
        _check_between("--connections", self.connections, 1, 256)
        _check_between("--min-tokens", self.min_tokens, 1, 4096)
        _check_between("--max-tokens", self.max_tokens, self.min_tokens, 4096)
        _check_between("--ready-s", self.ready_s, 0.05, 3600)
        _check_between("--timeout", self.request_timeout_s, 0.05, 600)
        check_target(self.url, i_own_this_host=self.i_own_this_host)

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
    surface: str  # query | chat | responses
    picture: int
    question: int
    max_tokens: int


def plan(scenario: Scenario) -> Iterator[Planned]:
    """The requests of a scenario in order of arrival: Poisson arrivals, and equal for equal seeds."""
    rng = random.Random(scenario.seed)
    surfaces = SURFACES[scenario.transport]
    due_s = 0.0
    for index in range(scenario.max_requests):
        if scenario.is_open_loop:
            due_s += rng.expovariate(scenario.rate)
            if due_s >= scenario.seconds:
                return
        yield Planned(
            index=index,
            due_s=due_s,
            surface=surfaces[index % len(surfaces)],
            picture=rng.randrange(scenario.pictures),
            question=rng.randrange(1 << 16),
            max_tokens=rng.randint(scenario.min_tokens, scenario.max_tokens),
        )


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


def _check_between(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ScenarioError(f"{option} must be between {low:g} and {high:g}, not {value:g}")
