"""Runs compose.yaml for real, as a project of its own on free ports, with its volumes removed at the end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
BUILD_S: Final = 1800.0
START_S: Final = 300.0


def docker(*words: str, timeout_s: float = 60.0) -> str:
    """What `docker …` printed. Raises AssertionError with its complaint."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr[-2000:]}"
    return done.stdout.strip()


def missing() -> str:
    """Why there are no containers here; empty if there are. Building images takes minutes: only who asks gets it."""
    if not os.environ.get("DEGAS_TEST_DOCKER"):
        return "DEGAS_TEST_DOCKER is not set; make test-docker"
    if shutil.which("docker") is None:
        return "docker is not installed"
    try:
        docker("info", timeout_s=10)
        docker("compose", "version", timeout_s=10)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return f"no Docker engine with Compose answers: {str(error)[:200]}"
    return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Services:
    """One compose project."""

    def __init__(self, name: str, *files: str, **variables: str) -> None:
        self.port, self.grpc_port = _free_port(), _free_port()
        ports = {"DEGAS_PORT": str(self.port), "DEGAS_GRPC_PORT": str(self.grpc_port)}
        self._environment = {**os.environ, **ports, **variables}
        chosen = [word for file in ("compose.yaml", *files) for word in ("-f", file)]
        self._command = ["docker", "compose", "-p", f"degas-test-{name}", *chosen]

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *words: str, timeout_s: float = START_S) -> str:
        """What `docker compose …` printed. Raises AssertionError with its complaint."""
        done = subprocess.run(
            [*self._command, *words],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=ROOT,
            env=self._environment,
        )
        assert done.returncode == 0, f"{' '.join(words)}: {(done.stdout + done.stderr)[-3000:]}"
        return done.stdout.strip()

    def build(self) -> None:
        """Build what the files name."""
        self.compose("build", timeout_s=BUILD_S)

    def up(self, *words: str) -> None:
        """Start, and wait until every health check passes."""
        self.compose("up", "-d", "--wait", "--no-build", *words)

    def containers(self, service: str) -> list[str]:
        """The ids of all of a service's containers."""
        return self.compose("ps", "-q", service).split()

    def wait_gone(self, service: str, timeout_s: float = 60.0) -> None:
        """Block until none of a service's containers runs. Raises AssertionError."""
        until_s = time.monotonic() + timeout_s
        while self.compose("ps", "-q", "--status", "running", service):
            assert time.monotonic() < until_s, f"{service} still runs"
            time.sleep(0.2)

    def inside(self, service: str, *words: str) -> str:
        """What a command printed in a container."""
        return self.compose("exec", "-T", service, *words)

    def wait_ready(self, timeout_s: float = 60.0) -> float:
        """Block until /readyz says 200; returns how long it took. Raises TimeoutError."""
        started_s = time.monotonic()
        while time.monotonic() - started_s < timeout_s:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                    return time.monotonic() - started_s
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.05)
        raise TimeoutError("not ready again")

    def up_since(self, *names: str) -> list[str]:
        """When each container of some services was started."""
        ids = [container for name in names for container in self.containers(name)]
        return [docker("inspect", "-f", "{{.State.StartedAt}}", container) for container in ids]

    def logs(self, *words: str) -> str:
        """What was logged: everything, or what `words` choose."""
        return self.compose("logs", "--no-color", *words).replace("\x1b[2K", "")  # Compose 2.26 clears lines


@contextmanager
def services(name: str, *words: str, files: tuple[str, ...] = (), **variables: str) -> Iterator[Services]:
    """A project that is up; `words` go to `up`."""
    project = Services(name, *files, **variables)
    project.compose("down", "-v", "--remove-orphans", "-t", "5")
    try:
        project.up(*words)
        yield project
    finally:
        project.compose("down", "-v", "--remove-orphans", "-t", "10")


def signal_worker(container: str, name: str) -> None:
    """Send a signal to the worker's own process in a container, below its supervisor: KILL, STOP, CONT."""
    docker("exec", container, "python", "-c", _SIGNAL.format(name=name))


_SIGNAL: Final = """
import os, pathlib, signal
def words(process):
    try: return (process / "cmdline").read_bytes().replace(b"\\0", b" ")
    except OSError: return b""
others = [one for one in pathlib.Path("/proc").iterdir() if one.name.isdigit() and one.name != str(os.getpid())]
workers = [int(one.name) for one in others if b"degas.rooms worker" in words(one)]
assert workers, [words(one) for one in others]
for pid in workers: os.kill(pid, signal.SIG{name})
"""


def wait_for(holds: Callable[[], bool], timeout_s: float = 90.0) -> None:
    """Block until it holds. Raises AssertionError."""
    until_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.2)


def size_over_base(image: str, base: str) -> int:
    """Bytes that an image adds to what it was built from."""
    size, below = (int(docker("image", "inspect", "-f", "{{.Size}}", name)) for name in (image, base))
    return size - below


def healthy(container: str) -> bool:
    """Whether the engine holds a container to be healthy."""
    state: dict[str, Any] = json.loads(docker("inspect", "-f", "{{json .State}}", container))
    return bool(state["Running"] and state.get("Health", {}).get("Status") == "healthy")
