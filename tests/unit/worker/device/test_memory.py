"""What is free: the kernel's word, and the limits of control groups, by version 1 and 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.device.memory import free_memory

GB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    """Files below a root that stands for /."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable:   {8 * GB >> 10} kB\n"}


@pytest.mark.parametrize(
    ("files", "free", "bound"),
    [
        ({}, 8 * GB, "MemAvailable"),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 8 * GB, "MemAvailable"),
        # Version 2: the group's own, one above it, and a container that sees itself as the top.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": f"{4 * GB}\n",
                "sys/fs/cgroup/a/b/memory.current": f"{3 * GB}\n",
                "sys/fs/cgroup/a/b/memory.stat": f"anon 5\ninactive_file {GB}\n",
            },
            2 * GB,
            "/a/b's limit of 4.29 GB",
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "5\n",
                "sys/fs/cgroup/a/memory.max": f"{GB}\n",
                "sys/fs/cgroup/a/memory.current": f"{2 * GB}\n",
            },
            0,
            "/a's limit",
        ),
        (
            {
                "proc/self/cgroup": "0::/../outside\n",
                "sys/fs/cgroup/memory.max": f"{GB}\n",
                "sys/fs/cgroup/memory.current": "0\n",
            },
            GB,
            "/'s limit",
        ),
        # Version 1, and its way of saying that there is no limit.
        (
            {
                "proc/self/cgroup": "12:cpu:/x\n4:memory:/docker/c\n",
                "sys/fs/cgroup/memory/docker/c/memory.limit_in_bytes": f"{3 * GB}\n",
                "sys/fs/cgroup/memory/docker/c/memory.usage_in_bytes": f"{2 * GB}\n",
                "sys/fs/cgroup/memory/docker/c/memory.stat": f"total_inactive_file {GB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{50 * GB}\n",
            },
            2 * GB,
            "/docker/c's limit",
        ),
    ],
    ids=["kernel", "no limit", "v2", "v2 above", "v2 container", "v1"],
)
def test_the_least_of_all_bounds(tmp_path: Path, files: dict[str, str], free: int, bound: str) -> None:
    found = free_memory(write(tmp_path, MEMINFO | files))
    assert found.num_bytes == free and bound in found.bound and found.is_known


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    found = free_memory(tmp_path)
    assert found.num_bytes == 0 and not found.is_known
    limited = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{GB}\n",
            "sys/fs/cgroup/memory.current": "0\n",
        },
    )
    assert free_memory(limited).num_bytes == GB


def test_this_machine() -> None:
    assert free_memory().num_bytes > 1 << 20
