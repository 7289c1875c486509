"""A Ray cluster of a head and two nodes on loopback addresses, and `degas ray up` on it, for tests."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

HEAD: Final = "127.0.0.2"  # Ray takes 127.0.0.1 for the machine's own address
NODES: Final = ("127.0.0.3", "127.0.0.4")
STORE_BYTES: Final = 80 << 20
QUICK_TO_SEE_DEATHS: Final = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
START_S: Final = 90.0


class Nodes:
    """The cluster. Nodes are added and killed by their address."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        common: dict[str, Any] = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
        head = {**common, "num_cpus": 0, "node_ip_address": HEAD, "_system_config": QUICK_TO_SEE_DEATHS}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        self.address = str(self._cluster.address)

    def add(self, ip: str, num_cpus: int = 2, num_gpus: int = 0) -> None:
        """Start a node; Ray believes any number of GPUs."""
        self._nodes[ip] = self._cluster.add_node(
            node_ip_address=ip, num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=STORE_BYTES
        )

    def kill(self, ip: str) -> None:
        """Kill a node's own process; Ray's processes on it, and what they started, end when they notice."""
        self._cluster.remove_node(self._nodes.pop(ip), allow_graceful=False)

    def close(self) -> None:
        """End everything."""
        self._cluster.shutdown()


@contextmanager
def nodes() -> Iterator[Nodes]:
    """A head and two nodes of two CPUs each. Who would use it needs a token."""
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    found = Nodes()
    try:
        for ip in NODES:
            found.add(ip)
        yield found
    finally:
        found.close()


class Up:
    """`degas ray up` as a process, with all that it said."""

    def __init__(self, address: str, *flags: str) -> None:
        common = ("--address", address, "--node-ip", HEAD)
        self._common = common
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "degas",
                "ray",
                "up",
                *common,
                "--port",
                "0",
                "--grpc-port",
                "none",
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def text(self) -> str:
        """All that it said."""
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        """Where its gateway serves; only once it is ready."""
        return next(line for line in self.lines if line.startswith("Degas is ready")).rpartition(" ")[2]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = START_S) -> float:
        """Until it holds; returns the seconds. Raises AssertionError with all that was said when it does not come true."""
        started_s = time.monotonic()
        while not condition():
            assert self.process.poll() is None, f"it ended:\n{self.text}"
            assert time.monotonic() - started_s < timeout_s, f"still not true:\n{self.text}"
            time.sleep(0.02)
        return time.monotonic() - started_s

    def wait_ready(self) -> None:
        """Until it says so."""
        self.wait_for(lambda: "Degas is ready" in self.text)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Another `degas ray …` on the same cluster."""
        command = [sys.executable, "-m", "degas", "ray", *words, *self._common]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def status(self) -> dict[str, Any]:
        """What `degas ray status --json` says."""
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def stop(self) -> None:
        """End it, whatever it takes."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reader.join(5)


@contextmanager
def up(address: str, *flags: str) -> Iterator[Up]:
    """`degas ray up` until the end of the block."""
    running = Up(address, *flags)
    try:
        yield running
    finally:
        running.stop()


def ours() -> dict[tuple[str, ...], dict[str, str]]:
    """Command lines of processes of ours that run and know this test's token, with their environments (Linux)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_text().split("\0")
            pairs = [pair.partition("=") for pair in (path / "environ").read_text().split("\0")]
        except (OSError, UnicodeDecodeError):
            continue
        environment = {name: value for name, _, value in pairs}
        is_of_test = environment.get("RAY_AUTH_TOKEN") == os.environ["RAY_AUTH_TOKEN"]
        if is_of_test and {"degas", "degas.rooms"} & set(words):
            found[(path.name, *words)] = environment
    return found


def folders() -> list[Path]:
    """Where running workers have their keys."""
    told = [
        seen.get("DEGAS_SERVE_STATUS_FILE")
        for words, seen in ours().items()
        if words[-3:-1] == ("--only", "worker")
    ]
    return [Path(path).parent for path in told if path]


def wait_gone(paths: list[Path], timeout_s: float = 20.0) -> None:
    """Until none of them exists. Raises AssertionError that names those left."""
    deadline_s = time.monotonic() + timeout_s
    while left := [path for path in paths if path.exists()]:
        assert time.monotonic() < deadline_s, f"left: {left}"
        time.sleep(0.05)
