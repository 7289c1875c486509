"""Workers are forked from a process that has loaded their libraries: real processes, the simulated device."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from loadtest.bench.chaos_server import Server, serving
from tests.integration.stack import until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux only")]
LIMIT_S = 60.0


def command_of(pid: int) -> list[str]:
    try:
        return [word.decode() for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if word]
    except OSError:
        return []


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def nursery_of(server: Server) -> int | None:
    return next((pid for pid in server.family() if "degas.nursery" in command_of(pid)), None)


def next_worker(server: Server, last: int) -> int:
    until(lambda: server.pid_of("worker") not in (None, last), LIMIT_S)
    pid = server.pid_of("worker")
    assert pid is not None
    return pid


def test_a_dead_worker_is_forked_anew_and_nothing_outlives_the_supervisor() -> None:
    with serving(["--device", "sim", "--sim-profile", "small"]) as server:
        first = next_worker(server, 0)
        nursery = nursery_of(server)
        assert nursery is not None
        assert command_of(first)[-3:] == ["-m", "degas.rooms", "worker"], "it is shown as what it is"
        assert parent_of(first) == server.pid, "the supervisor hears of its death at once"

        os.kill(first, signal.SIGKILL)
        second = next_worker(server, first)
        until(lambda: not any(state == "Z" for _, state in server.family().values()), LIMIT_S)
        assert nursery_of(server) == nursery and parent_of(second) == server.pid

        os.kill(nursery, signal.SIGKILL)
        until(lambda: nursery_of(server) is None, LIMIT_S)
        assert server.pid_of("worker") == second, "a worker does not need what it came from"
        os.kill(second, signal.SIGKILL)
        third = next_worker(server, second)
        assert parent_of(third) == server.pid

        assert not [line for line in server.endings() if "no decode progress" in line], (
            "killed as soon as it was ready"
        )

        family = list(server.family())
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not any(command_of(pid) for pid in family), LIMIT_S)
