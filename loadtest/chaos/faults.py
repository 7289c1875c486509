"""Owns `degas faults`: every promised fault done for real, what clients saw, how long it took, and whether the promise was kept.

A fault is a function that starts the service it needs on loopback, hurts it, and returns findings. Main thread; each
fault has an asyncio loop of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich import box
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Found:
    """One promise of a fault."""

    promise: str
    saw: str
    kept: bool
    took_s: float | None = None
    bound_s: float | None = None

    @classmethod
    def within(
        cls, promise: str, took_s: float, bound_s: float, saw: str = "", *, also: bool = True
    ) -> Found:
        """A promise of a time, and perhaps of something else."""
        return cls(promise, saw, took_s <= bound_s and also, took_s, bound_s)


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it: the whole table takes some minutes, the quick one runs in tests."""

    streams: int = 200  # open while a gateway is told to end, and while workers are killed
    seconds: float = 3.0  # of each stretch of a flood
    shorts: int = 30  # beside the long prompt on a slow device

    def check(self) -> None:
        """Raises ValueError naming the option and a value that would work."""
        if not 8 <= self.streams <= 1000:
            raise ValueError(f"--streams is {self.streams}; 8 to 1000 would work, such as 200")


Hurt = Callable[[Size], Awaitable[list[Found]]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the table; `is_timed`: a busy machine alone may break its promise."""

    name: str
    what: str
    hurt: Hurt
    needs: str = "sim"  # or pocket, which needs torch


@dataclass(slots=True)
class Outcome:
    """What a fault showed; `broken` says why it could not be done."""

    fault: Fault
    found: list[Found] = field(default_factory=list)
    seconds: float = 0.0
    broken: str = ""

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return not self.broken and bool(self.found) and all(one.kept for one in self.found)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "fault": self.fault.name,
            "what": self.fault.what,
            "kept": self.kept,
            "seconds": round(self.seconds, 2),
            "broken": self.broken,
            "found": [asdict(one) for one in self.found],
        }


LIMIT_S: Final = 180.0


def do(fault: Fault, size: Size) -> Outcome:
    """Do one fault. What goes wrong with it is part of the outcome; only an interrupt ends it early."""
    outcome = Outcome(fault)
    started_s = time.perf_counter()

    async def limited() -> list[Found]:
        async with asyncio.timeout(LIMIT_S):
            return await fault.hurt(size)

    try:
        outcome.found = asyncio.run(limited())
    except TimeoutError as error:
        outcome.broken = str(error) or f"it did not end within {LIMIT_S:g} s"
    except Exception as error:  # a table with a hole says more than none
        outcome.broken = f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - started_s
    return outcome


def fault_table(outcomes: Iterable[Outcome]) -> Table:
    """A line for each promise."""
    table = Table(
        title="faults, done for real on loopback",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("fault", overflow="fold", ratio=3)
    table.add_column("promise", overflow="fold", ratio=4)
    table.add_column("what was seen", overflow="fold", ratio=5)
    for name in ("took", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kept", no_wrap=True)
    for outcome in outcomes:
        if outcome.broken:
            line = Text(outcome.broken.strip().splitlines()[0][:300])
            table.add_row(Text(outcome.fault.what), "", line, "", "", Text("NOT DONE", style="bold red"))
        for number, one in enumerate(outcome.found):
            table.add_row(
                Text(outcome.fault.what if number == 0 else ""),
                Text(one.promise),
                Text(one.saw),
                _time(one.took_s),
                _time(one.bound_s),
                Text("yes" if one.kept else "NO", style="green" if one.kept else "bold red"),
            )
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def counted(words: Iterable[str]) -> str:
    """How many of each, the most frequent first."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return (
        ", ".join(f"{number} {word}" for word, number in sorted(counts.items(), key=lambda item: -item[1]))
        or "none"
    )
