"""Owns several real workers and gateways as processes on this machine: start, kill, start again, end. The caller's thread.

Nothing supervises them: whoever starts a fleet decides what dies and what comes back. Everything started here is ended
here, by pid. `degas serve`, with its supervisor, is `loadtest.bench.chaos_server`'s.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loadtest.peers.process import free_port
from loadtest.peers.waiting import Watched, wait_ready

STOP_TIMEOUT_S: Final = 10.0


@dataclass(slots=True)
class Member:
    """One process of a fleet; `process` is the one that runs now, or that ran last."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    address: str  # a worker's endpoint, a gateway's URL
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def watched(self) -> Watched:
        """For waiting until it does something."""
        assert self.process is not None
        return Watched(self.name, self.process, self.log)

    def start(self) -> None:
        """Start it; again, after it has ended."""
        assert not self.is_running
        own = {name: value for name, value in os.environ.items() if not name.startswith("DEGAS_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env={**own, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def send(self, number: signal.Signals) -> None:
        """A signal to a running process; one that has ended gets none."""
        if self.is_running:
            assert self.process is not None
            self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        """Ask it to end, then kill it."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGINT)

    def reap(self, timeout_s: float) -> None:
        """Wait for the end that was asked for, then kill."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(slots=True)
class Fleet:
    """All members; every gateway knows every worker, and listens on a port of its own."""

    folder: Path
    workers: list[Member] = field(default_factory=list)
    gateways: list[Member] = field(default_factory=list)

    @property
    def members(self) -> list[Member]:
        """Gateways first, as they should end first."""
        return [*self.gateways, *self.workers]

    @property
    def urls(self) -> list[str]:
        """Where the gateways listen."""
        return [gateway.address for gateway in self.gateways]

    @property
    def url(self) -> str:
        """Where the first gateway listens."""
        return self.gateways[0].address

    def wait_ready(self) -> None:
        """Wait until every gateway that runs has a worker. Raises as `loadtest.peers.waiting.wait_until` does."""
        running = [member.watched for member in self.members if member.is_running]
        for gateway in self.gateways:
            if gateway.is_running:
                wait_ready(gateway.address, running)

    def stop(self) -> None:
        """End everything."""
        for member in self.members:
            member.stop()
        for member in self.members:
            member.reap(STOP_TIMEOUT_S)

    def said(self) -> str:
        """The last lines of every member."""
        started = [member for member in self.members if member.process is not None]
        return "\n".join(f"{member.name} said:\n{member.watched.last_lines()}" for member in started)


def worker_member(
    folder: Path, number: int, flags: Sequence[str], endpoint: str, module: Sequence[str]
) -> Member:
    """A worker that is not started yet; `module` is what Python runs, `worker` unless it is a broken one."""
    command = [sys.executable, "-m", *module, "--endpoint", endpoint, "--log-level", "warning", *flags]
    name = f"worker-{number}"
    return Member(name, command, {}, folder / f"{name}.log", endpoint)


def gateway_member(
    folder: Path, number: int, endpoints: Sequence[str], settings: Mapping[str, str]
) -> Member:
    """A gateway that is not started yet; `settings` by their names without prefix."""
    port = free_port()
    given = {
        "workers": ",".join(endpoints),
        "port": str(port),
        "log_level": "warning",
        "image_processes": "1",
        **settings,
    }
    environment = {f"DEGAS_GATEWAY_{name.upper()}": value for name, value in given.items()}
    name = f"gateway-{number}"
    command = [sys.executable, "-m", "degas.rooms", "gateway"]
    return Member(name, command, environment, folder / f"{name}.log", f"http://127.0.0.1:{port}")


@contextmanager
def fleet(
    worker_flags: Sequence[str],
    *,
    num_workers: int = 1,
    num_gateways: int = 1,
    gateway_settings: Mapping[str, str] | None = None,
    endpoints: Sequence[str] = (),
    gateway_endpoints: Sequence[str] = (),
    module: Sequence[str] = ("degas.rooms", "worker"),
) -> Iterator[Fleet]:
    """A running fleet, ready, until the end of the block.

    `endpoints` are the workers' own, ipc:// files where none are given; `gateway_endpoints` where gateways look for
    them, if that is elsewhere (a proxy). On an error the members' last lines go to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="degas-fleet-") as folder_name:
        folder = Path(folder_name)
        own = list(endpoints) or [f"ipc://{folder}/worker-{number}.sock" for number in range(num_workers)]
        made = Fleet(folder)
        made.workers = [
            worker_member(folder, number, worker_flags, endpoint, module)
            for number, endpoint in enumerate(own)
        ]
        made.gateways = [
            gateway_member(folder, number, gateway_endpoints or own, gateway_settings or {})
            for number in range(num_gateways)
        ]
        try:
            for member in made.members:
                member.start()
            made.wait_ready()
            yield made
        except BaseException:
            sys.stderr.write(made.said()[-6000:] + "\n")
            raise
        finally:
            made.stop()
