"""Owns saying how much memory a process on this machine may still take: the kernel's word, and its container's limits. Any thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.control_groups import ROOT, Group, groups_of

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes that can be taken, and what bounds them, in words; 0 where the system does not say."""

    num_bytes: int
    bound: str

    @property
    def is_known(self) -> bool:
        """Whether the system says anything."""
        return self.num_bytes > 0 or self.bound != "MemAvailable"


def free_memory(root: Path = ROOT) -> FreeMemory:
    """The least of MemAvailable and what is left below every memory limit of this process's control groups, v1 or v2.

    Pages of files that a group could drop count as left. `root` is where /proc and /sys are looked for.
    """
    found = [FreeMemory(_available(root), "MemAvailable")]
    for group, limit, used in _limits(root):
        found.append(
            FreeMemory(max(0, limit - used), f"the control group {group}'s limit of {gigabytes(limit)}")
        )
    known = [one for one in found if one.is_known]
    return min(known, key=lambda one: one.num_bytes, default=found[0])


def gigabytes(num_bytes: float) -> str:
    """For people: megabytes below 1 GB."""
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"


def _available(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _limits(root: Path) -> Iterator[tuple[str, int, int]]:
    """(name, limit, used) of this process's group and of those that it lies in."""
    for group in groups_of("memory", root):
        most, used, droppable = _FILES[group.version]
        try:
            limit, taken = int(group.read(most)), int(group.read(used))  # "max" is no number: no limit
        except (OSError, ValueError):
            continue
        if limit < _UNLIMITED:
            yield group.name, limit, max(0, taken - _statistic(group, droppable))


def _statistic(group: Group, name: str) -> int:
    try:
        lines = group.read("memory.stat").splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[:1] == [name])
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
