"""Owns the processes of one measurement: a mock engine, a stack in front of it, clients before that. The command's main thread.

Processes are started here and ended here, by pid. Processor time is the kernel's own, in nanoseconds, over all threads of
the stack's process.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtest.gateway.counters import Counters
from loadtest.gateway.engine import FIRST_ID
from loadtest.peers.process import free_port
from loadtest.peers.waiting import Watched, wait_ready

_ROOMS: Final = (sys.executable, "-m", "degas.rooms")
_REFERENCE: Final = Path(__file__).parent / "reference.py"
_CLIENT_TIMEOUT_S: Final = 150.0


class BenchError(RuntimeError):
    """A measurement that failed, in one line."""


@dataclass(frozen=True, slots=True)
class Load:
    """One line of the table. `rate`: tokens a second of each stream."""

    transport: str  # sse | websocket | http
    streams: int
    rate: float
    groups: int = 1  # sequences are spread over so many steps

    @property
    def steps_per_s(self) -> float:
        """How often the engine sends a frame."""
        return self.rate * self.groups


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of one stack gave. `us`: processor time a token, or a request for http."""

    us: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    kb_per_stream: float | None = None


def cpu_ns(pid: int) -> int:
    """Processor time of all threads of a process so far. Raises OSError when it is gone."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            continue  # a thread that has ended meanwhile
    return total


def resident_kb(pid: int) -> int:
    """Memory of a process that is its own or in use, kB. Raises OSError when it is gone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


@contextmanager
def started(
    name: str, command: list[str], log: Path, variables: dict[str, str] | None = None
) -> Iterator[Watched]:
    """A process, killed on the way out: nothing of it is to be kept."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if name == "the clients" else output,
            stderr=output,
        )
    try:
        yield Watched(name, process, log)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _gateway(endpoint: str, port: int, python: str | None) -> tuple[list[str], dict[str, str]]:
    if python is not None:
        return [python, "-P", str(_REFERENCE), endpoint, str(port), str(FIRST_ID)], {"PYTHONPATH": ""}
    settings = {
        "WORKERS": endpoint,
        "PORT": str(port),
        "LOG_LEVEL": "warning",
        "REQUEST_DEADLINE_S": "3600",
        "IMAGE_PROCESSES": "1",
    }
    return [*_ROOMS, "gateway"], {f"DEGAS_GATEWAY_{name}": value for name, value in settings.items()}


class _Clients:
    """The clients' process, by its lines."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def hear(self) -> dict[str, Any]:
        """Its next line. Raises `BenchError` when it has none."""
        output = self._watched.process.stdout
        assert output is not None
        readable, _, _ = select.select([output], [], [], _CLIENT_TIMEOUT_S)
        line = output.readline() if readable else b""
        if not line:
            raise BenchError(f"the clients failed: {self._watched.last_lines()}")
        said: dict[str, Any] = json.loads(line)
        return said

    def tell(self, word: str) -> None:
        """One word."""
        pipe = self._watched.process.stdin
        assert pipe is not None
        pipe.write(word.encode() + b"\n")
        pipe.flush()


def take_turn(load: Load, seconds: float, python: str | None) -> Turn:
    """Start everything, let it settle, measure for `seconds`. `python`: the reference's; None: Degas.

    Raises `BenchError`, `loadtest.peers.waiting.ProcessEnded` or TimeoutError.
    """
    with tempfile.TemporaryDirectory(prefix="degas-bench-") as name:
        folder = Path(name)
        endpoint, port, shared = f"ipc://{folder}/engine.sock", free_port(), folder / "counters"
        counters = Counters(shared, create=True)
        engine = [*_ROOMS, "loadtest.gateway.engine", endpoint, str(shared)]
        client = [*_ROOMS, "loadtest.gateway.client", load.transport, str(port), str(shared)]
        command, variables = _gateway(endpoint, port, python)
        with (
            started(
                "the engine", [*engine, str(load.steps_per_s), str(load.groups)], folder / "engine.log"
            ) as one,
            started("the gateway", command, folder / "gateway.log", variables) as gateway,
        ):
            wait_ready(f"http://127.0.0.1:{port}", (one, gateway))
            pid = gateway.process.pid
            idle_kb = resident_kb(pid)
            with started("the clients", [*client, str(load.streams)], folder / "clients.log") as clients:
                try:
                    return _measure(load, seconds, pid, idle_kb, counters, _Clients(clients))
                except BenchError as error:
                    raise BenchError(f"{error}\n{gateway.last_lines()}") from None


def _measure(
    load: Load, seconds: float, pid: int, idle_kb: int, counters: Counters, clients: _Clients
) -> Turn:
    clients.hear()
    time.sleep(min(1.0, seconds / 3))
    is_http = load.transport == "http"
    clients.tell("measure")
    before, ns = (counters.answers if is_http else counters.tokens), cpu_ns(pid)
    time.sleep(seconds)
    count, ns = (counters.answers if is_http else counters.tokens) - before, cpu_ns(pid) - ns
    held_kb = resident_kb(pid) - idle_kb
    clients.tell("stop")
    noted = clients.hear()
    if not count:
        raise BenchError("nothing was sent while it was measured")
    if not is_http and abs(noted["num_tokens"] - count) > max(2 * load.streams, 0.1 * count):
        raise BenchError(
            f"{count} tokens were sent and {noted['num_tokens']} arrived: the clients cannot follow"
        )
    return Turn(ns / count / 1000, noted["p50_ms"], noted["p99_ms"], held_kb / load.streams)
