"""How many cores a process may keep busy: where it may run, and the limits of control groups, by version 1 and 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.control_groups import num_cores

V2, V1 = "0::/a/b\n", "4:cpu,cpuacct:/a\n3:memory:/a\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 2),  # a group above it
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),  # inside a container
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "6400000 100000\n"}, 16),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "rubbish"}, 16),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
    ],
)
def test_the_least_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert num_cores(tmp_path) == cores
