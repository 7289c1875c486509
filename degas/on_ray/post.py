"""Owns what an actor does on its node: one supervised worker, with its keys and its port. The actor's main thread; a thread reads.

Ray places this class as an actor (`cluster`); nothing here knows Ray, so that it is also tested without. No method blocks: an
actor does one thing at a time, and "how are you" must be answered while a worker ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from degas.child import LEASH, SCRIPT, Guard

LINES: Final = 200  # of what a worker said, kept until they are asked for
LINE_CHARS: Final = 2000
_COMMAND: Final = (sys.executable, "-m", "degas", "serve", "--only", "worker")


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is told: its settings as variables, and how it meets gateways."""

    settings: Mapping[str, str]  # DEGAS_WORKER_… and DEGAS_SERVE_…
    keys: Mapping[str, bytes] | None = field(
        default=None, repr=False
    )  # by file name; None: they lie in `keys_dir`
    keys_dir: str | None = None
    ports: tuple[int, int] | None = None  # the first and the last it may take; None: any
    command: tuple[str, ...] = ()  # in place of `degas serve --only worker`, for tests


class WorkerPost:
    """One worker's place on one node. A new one is a new worker on a new port."""

    def __init__(self, task: Task, node_ip: str, node_id: str) -> None:
        """Start the worker. Raises OSError where that cannot be done."""
        self._guard = Guard(
            apart=True
        )  # kills the worker and removes the keys, should this process be killed
        self._folder = Path(tempfile.mkdtemp(prefix="degas-ray-"))  # mkdtemp makes it 0700
        self._guard.say(f"folder {self._folder}")
        self._lines: deque[str] = deque(maxlen=LINES)
        self._status = self._folder / "status.json"
        self._port = hold_port(node_ip, task.ports)
        port = self._port.getsockname()[1]
        host = f"[{node_ip}]" if ":" in node_ip else node_ip
        self._known = {
            "endpoint": f"tcp://{host}:{port}",
            "node_ip": node_ip,
            "node_id": node_id,
            "pid": os.getpid(),
        }
        self._process = subprocess.Popen(
            [*SCRIPT, str(LEASH), str(os.getpid()), *(task.command or _COMMAND)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment(task, str(self._known["endpoint"])),
            start_new_session=True,
        )
        self._guard.say(f"watch {self._process.pid}")
        self._reader = threading.Thread(target=self._read, name="worker-output", daemon=True)
        self._reader.start()

    def describe(self) -> dict[str, Any]:
        """Where the worker is and how it is; `lines` are those it said since the last time this was asked.

        `code` is the exit code once it has ended: 2 for settings that it refuses, 1 for a loop of crashes.
        """
        code = self._process.poll()
        if code is not None:
            self._reader.join(1.0)
            self._clean_up()
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return {**self._known, "code": code, "ready": code is None and self._is_ready(), "lines": lines}

    def stop(self) -> None:
        """Ask the worker to finish what it has begun and to end. Ask `describe` whether it has."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _environment(self, task: Task, endpoint: str) -> dict[str, str]:
        """This node's variables without any of ours: what a worker is told is the same on every node."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DEGAS_")}
        keys_dir = task.keys_dir
        if task.keys is not None:
            keys_dir = str(self._folder / "keys")
            write_keys(Path(keys_dir), task.keys)
        assert keys_dir is not None, "a worker that strangers could reach"
        return environment | {
            **task.settings,
            "DEGAS_WORKER_ENDPOINT": endpoint,
            "DEGAS_WORKER_CURVE_KEY_DIR": keys_dir,
            "DEGAS_SERVE_STATUS_FILE": str(self._status),
        }

    def _is_ready(self) -> bool:
        try:
            return bool(json.loads(self._status.read_text())["worker"]["ready"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _read(self) -> None:
        """Keep what the worker says, and pass it on to this process's own output, which Ray keeps in its log files."""
        assert self._process.stdout is not None
        for data in self._process.stdout:
            line = data.decode(errors="replace").rstrip("\r\n")[:LINE_CHARS]
            self._lines.append(line)
            sys.stderr.write(line + "\n")

    def _clean_up(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever it left behind
        except (ProcessLookupError, PermissionError):
            pass
        self._guard.say(f"forget {self._process.pid}")
        self._port.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def write_keys(folder: Path, keys: Mapping[str, bytes]) -> None:
    """Write key files that only we may read."""
    folder.mkdir(mode=0o700)
    for name, data in keys.items():
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)


def hold_port(host: str, ports: tuple[int, int] | None) -> socket.socket:
    """A socket that keeps a free TCP port of `host` for the worker, as long as it is open. Raises OSError when all are taken.

    A worker binds its port seconds after it is started, and again after a crash: without this, another one would take it. On
    Linux a port may be bound twice where both sides allow it and only one listens: ZeroMQ does, and another `hold_port` does not.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (0,) if ports is None else range(ports[0], ports[1] + 1):
        held = socket.socket(family, socket.SOCK_STREAM)
        try:
            held.bind((host, port))
        except OSError:
            held.close()
            if ports is None:
                raise
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
    assert ports is not None
    raise OSError(
        f"every port from {ports[0]} to {ports[1]} of {host} is taken; give worker_ports a wider range"
    )
