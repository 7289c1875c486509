"""A real gateway and a real worker as processes, for tests that need both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.bench.processes import WorkerProbe
from loadtest.peers.process import free_port
from loadtest.peers.waiting import Watched, wait_ready


@dataclass
class Stack:
    """One gateway (or more) and one worker that tests may kill and start again."""

    folder: Path
    worker_flags: list[str]
    gateway_settings: dict[str, str]
    port: int = field(default_factory=free_port)
    worker: subprocess.Popen[bytes] | None = None
    gateway: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.folder}/worker.sock"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_worker(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "worker", "--endpoint", self.endpoint, *self.worker_flags]
        with (self.folder / "worker.log").open("ab") as log:
            self.worker = subprocess.Popen(command, stdout=log, stderr=log)
        return self.worker

    def start_gateway(self) -> subprocess.Popen[bytes]:
        settings = {
            "DEGAS_GATEWAY_WORKERS": self.endpoint,
            "DEGAS_GATEWAY_PORT": str(self.port),
            **self.gateway_settings,
        }
        with (self.folder / "gateway.log").open("ab") as log:
            self.gateway = subprocess.Popen(
                [sys.executable, "-m", "gateway"], env={**os.environ, **settings}, stdout=log, stderr=log
            )
        return self.gateway

    @property
    def processes(self) -> list[Watched]:
        """What was started here."""
        both = (("the worker", self.worker, "worker.log"), ("the gateway", self.gateway, "gateway.log"))
        return [Watched(name, child, self.folder / log) for name, child, log in both if child is not None]

    def wait_ready(self) -> None:
        wait_ready(self.url, self.processes)

    def probe(self) -> WorkerProbe:
        return WorkerProbe(self.endpoint, self.processes[:1] if self.worker is not None else ())

    def logs(self) -> str:
        return "\n".join(f"{watched.name} said:\n{watched.last_lines()}" for watched in self.processes)

    def stop(self) -> None:
        for child in (self.gateway, self.worker):
            if child is not None and child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.send_signal(signal.SIGINT)
        for child in (self.gateway, self.worker):
            if child is not None:
                try:
                    child.wait(5)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


@contextmanager
def stack(worker_flags: list[str], **gateway_settings: str) -> Iterator[Stack]:
    """Start both, wait until ready, and leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="degas-test-") as folder:
        settings = {f"DEGAS_GATEWAY_{name.upper()}": value for name, value in gateway_settings.items()}
        running = Stack(Path(folder), worker_flags, settings)
        try:
            running.start_worker()
            running.start_gateway()
            running.wait_ready()
            yield running
        except BaseException:
            sys.stderr.write(running.logs())
            raise
        finally:
            running.stop()


SIM = ["--device", "sim", "--sim-profile", "small"]
POCKET = ["--device", "cpu"]


def until(condition: object, timeout_s: float = 5.0) -> float:
    """Wait for `condition()` to hold; returns how long it took. Raises TimeoutError."""
    assert callable(condition)
    started_s = time.perf_counter()
    while not condition():
        if time.perf_counter() - started_s > timeout_s:
            raise TimeoutError("the condition does not come true")
        time.sleep(0.005)
    return time.perf_counter() - started_s
