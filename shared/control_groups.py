"""Owns finding the control groups that this process lies in, version 1 and 2, and the cores that they leave it. Any thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Group:
    """One control group, with its files' folder; what files are called depends on the version."""

    version: int
    name: str
    folder: Path

    def read(self, file: str) -> str:
        """What one of its files says. Raises OSError."""
        return (self.folder / file).read_text()


def groups_of(controller: str, root: Path = ROOT) -> Iterator[Group]:
    """This process's group and all that it lies in, the innermost first, of a controller such as `memory` or `cpu`.

    In a container the path may be the host's, whose folders are not seen here: the mount's own top then has the limit. `root`
    is where /proc and /sys are looked for.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            version, home = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, home = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            yield Group(version, "/" + "/".join(parts[:count]), home.joinpath(*parts[:count]))


def num_cores(root: Path = ROOT) -> int:
    """The cores that this process may keep busy: those it may run on, less if its container's limit of processor time is less.

    A limit of 2.5 cores counts as 2, one below a core as 1: whoever keeps more threads busy is stopped in the middle of each period.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in groups_of("cpu", root):
        try:
            if group.version == 2:
                quota, period = (int(word) for word in group.read("cpu.max").split())  # "max" is no number
            else:
                quota, period = int(group.read("cpu.cfs_quota_us")), int(group.read("cpu.cfs_period_us"))
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:  # version 1 writes "no limit" as -1
            found = min(found, quota // period)
    return max(1, found)
