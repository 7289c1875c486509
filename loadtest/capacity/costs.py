"""Owns the file of costs: a model on a device, a gateway, the link between workers. Reads TOML; nothing else."""

from __future__ import annotations

import math
import tomllib
from bisect import bisect_left
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

BUILT_IN: Final = Path(__file__).with_name("costs.toml")
T = TypeVar("T")


class CostsError(ValueError):
    """A file that cannot be used; the message names the table and the line's name."""


@dataclass(frozen=True, slots=True)
class GatewayCosts:
    """Processor time of one gateway, which is one core; its picture processes have cores of their own."""

    request_us: float
    token_us: float
    refusal_us: float = 71.0
    picture_ms: float = 25.0
    image_processes: int = 2
    source: str = ""


@dataclass(frozen=True, slots=True)
class LinkCosts:
    """Moving features or pages from one worker to another."""

    gb_per_s: float = 10.0
    latency_us: float = 100.0
    source: str = ""

    def seconds(self, num_bytes: float) -> float:
        """For one move."""
        return self.latency_us * 1e-6 + num_bytes / (self.gb_per_s * 1e9)


@dataclass(frozen=True)
class DeviceCosts:
    """One model on one device. `step_ms` maps decode rows to a step's time, sampling included."""

    step_ms: dict[int, float]
    prefill_us_per_token: float
    kv_bytes_per_token: float
    kv_gb: float
    prefill_ms: float = 0.0
    crop_ms: float = 0.0
    picture_tokens: int = 0
    max_rows: int = 32
    mixed_tokens: int = 1024
    feature_mb: float = 0.0
    source: str = ""

    @cached_property
    def _known(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        rows = sorted(self.step_ms)
        return tuple(rows), tuple(self.step_ms[count] / 1e3 for count in rows)

    def step_s(self, rows: int) -> float:
        """A step's time: between known rows linear, beyond the last along the last slope, never shorter than the first."""
        known, seconds = self._known
        if rows <= known[0] or len(known) == 1:
            return seconds[0]
        place = min(bisect_left(known, rows), len(known) - 1)
        low, high = known[place - 1], known[place]
        slope = (seconds[place] - seconds[place - 1]) / (high - low)
        return max(seconds[0], seconds[place - 1] + slope * (rows - low))

    def prefill_s(self, tokens: float) -> float:
        """Device time of a prompt."""
        return self.prefill_ms / 1e3 + tokens * self.prefill_us_per_token * 1e-6

    def encode_s(self, crops: float) -> float:
        """Device time of a picture's encoder."""
        return crops * self.crop_ms / 1e3

    def rows(self, context_tokens: float) -> int:
        """How many sequences of this length run at once: as memory or `max_rows` allow. 0: not even one fits."""
        if not context_tokens:
            return self.max_rows
        return min(self.max_rows, int(self.kv_gb * 1e9 / (context_tokens * self.kv_bytes_per_token)))


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything a simulation needs to know of prices in time."""

    name: str
    device: DeviceCosts
    gateway: GatewayCosts
    link: LinkCosts


def read_costs(path: Path | None, profile: str) -> Costs:
    """A profile of a file; the built-in one without a path. Raises `CostsError`."""
    tables = _load(path)
    found = tables.pop("profile", None)
    if not isinstance(found, dict) or not found:
        raise CostsError(f"{path}: there is no table [profile.NAME]")
    if profile not in found:
        raise CostsError(f"there is no profile {profile!r}; there are: {', '.join(sorted(found))}")
    unknown = set(tables) - {"gateway", "link"}
    if unknown:
        raise CostsError(f"[{min(unknown)}] is no table of this file; gateway, link and profile.NAME are")
    built_in = _load(None)
    device = dict(found[profile])
    steps = device.get("step_ms")
    if not isinstance(steps, dict) or not steps:
        raise CostsError(
            f"[profile.{profile}] step_ms must be rows with their milliseconds, as {{ 1 = 2.5, 32 = 4.0 }}"
        )
    try:
        device["step_ms"] = {int(rows): float(ms) for rows, ms in steps.items()}
    except (TypeError, ValueError):
        raise CostsError(
            f"[profile.{profile}] step_ms: {steps!r} are not rows with their milliseconds"
        ) from None
    if min(device["step_ms"]) < 1 or not all(0 < ms < 1e6 for ms in device["step_ms"].values()):
        raise CostsError(f"[profile.{profile}] step_ms: rows count from 1, and steps take more than 0 ms")
    return Costs(
        profile,
        _make(DeviceCosts, device, f"profile.{profile}"),
        _make(GatewayCosts, tables.get("gateway", built_in["gateway"]), "gateway"),
        _make(LinkCosts, tables.get("link", built_in["link"]), "link"),
    )


def profiles(path: Path | None) -> list[str]:
    """The names that a file has. Raises `CostsError`."""
    return sorted(_load(path).get("profile", {}))


def _load(path: Path | None) -> dict[str, Any]:
    try:
        return tomllib.loads((path or BUILT_IN).read_text())
    except OSError as error:
        raise CostsError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CostsError(f"{path} is no TOML: {error}") from None


def _make(kind: type[T], given: Any, table: str) -> T:
    if not isinstance(given, dict):
        raise CostsError(f"[{table}] is no table")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in known:
            raise CostsError(f"[{table}] {name} is not known; there are: {', '.join(known)}")
        if name in ("step_ms", "source"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < math.inf):
            raise CostsError(f"[{table}] {name} must be a number of at least 0, not {value!r}")
        if name in ("max_rows", "mixed_tokens", "image_processes", "gb_per_s", "kv_gb") and value <= 0:
            raise CostsError(f"[{table}] {name} must be more than 0")
    try:
        return kind(**given)
    except TypeError as error:
        raise CostsError(f"[{table}] {error}".replace("__init__() ", "")) from None
