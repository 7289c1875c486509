"""Owns the server of `degas bench chaos`: `degas serve` as a process, its pids, and what it holds at rest. Main thread.

Everything is started here and ended here, by pid; what the server itself started ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import urlsplit

START_TIMEOUT_S: Final = 300.0
STOP_TIMEOUT_S: Final = 20.0
LOG: Final = "log"
POLL_S: Final = 0.01
READY_LINE: Final = "DEGAS-READY "


@dataclass(frozen=True, slots=True)
class Held:
    """What the server holds when nothing is asked of it."""

    processes: int
    gateway_descriptors: int
    gateway_threads: int
    supervisor_descriptors: int
    supervisor_threads: int
    worker_descriptors: int
    worker_threads: int
    requests: int
    running: int
    used_pages: int
    zombies: int


@dataclass(frozen=True, slots=True)
class Server:
    """A running `degas serve`."""

    url: str
    pid: int
    status: Path

    def pid_of(self, role: str) -> int | None:
        """The worker or the gateway that serves, by the supervisor's status file; None while there is none."""
        try:
            post = json.loads(self.status.read_text())[role]
        except (OSError, ValueError, KeyError):
            return None
        pid = post["pid"]
        return int(pid) if post["ready"] and pid is not None and Path(f"/proc/{pid}").exists() else None

    def deaths(self) -> int:
        """How many workers have died so far."""
        try:
            return int(json.loads(self.status.read_text())["worker"]["deaths"])
        except (OSError, ValueError, KeyError):
            return 0

    def endings(self) -> list[str]:
        """What the supervisor said of every child that ended, and why."""
        text = (self.status.parent / LOG).read_text(errors="replace")
        return [line for line in text.splitlines() if " ended (" in line or "killing it" in line]

    def held(self) -> Held:
        """Counted now. Raises OSError or KeyError while the worker is away."""
        worker, gateway = self.pid_of("worker"), self.pid_of("gateway")
        if worker is None or gateway is None:
            raise OSError("no worker serves")
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5.0) as reply:
            figures = sums_by_name(reply.read().decode())
        total, free = figures["degas_worker_total_pages"], figures["degas_worker_free_pages"]
        family = self.family()
        return Held(
            processes=len(family),
            gateway_descriptors=_count(gateway, "fd"),
            gateway_threads=_count(gateway, "task"),
            supervisor_descriptors=_count(self.pid, "fd"),
            supervisor_threads=_count(self.pid, "task"),
            worker_descriptors=_count(worker, "fd"),
            worker_threads=_count(worker, "task"),
            requests=int(figures["degas_requests_in_flight"] + figures["degas_requests_recovering"]),
            running=int(figures["degas_worker_num_running"] + figures["degas_worker_num_waiting"]),
            used_pages=int(total - free),
            zombies=sum(state == "Z" for _, state in family.values()),
        )

    def family(self) -> dict[int, tuple[int, str]]:
        """The supervisor and all its descendants: parent and state of each."""
        everybody: dict[int, tuple[int, str]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                everybody[int(entry)] = (int(fields[1]), fields[0])
        found = {self.pid: everybody.get(self.pid, (0, "?"))}
        while more := {p: v for p, v in everybody.items() if v[0] in found and p not in found}:
            found |= more
        return found

    def gateway_bytes(self) -> int:
        """The gateway's resident memory; 0 while there is none."""
        pid = self.pid_of("gateway")
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")


class Readiness(threading.Thread):
    """Asks all the time whether the server is ready, on a connection that it keeps. A thread of its own: the clients' loop is
    busy, and an absence may be short."""

    def __init__(self, url: str) -> None:
        super().__init__(name="chaos-readiness", daemon=True)
        self.answers: list[tuple[float, bool]] = []  # when, and whether
        self._address = urlsplit(url)
        self._ended = threading.Event()

    def run(self) -> None:
        connection = HTTPConnection(self._address.hostname or "", self._address.port, timeout=5.0)
        while not self._ended.wait(POLL_S):
            try:
                connection.request("GET", "/readyz")
                reply = connection.getresponse()
                reply.read()
                is_ready = reply.status == 200
            except (OSError, HTTPException):
                connection.close()
                is_ready = False
            self.answers.append((time.perf_counter(), is_ready))
        connection.close()

    def end(self) -> None:
        """Stop asking."""
        self._ended.set()
        self.join()


def absence(
    answers: Sequence[tuple[float, bool]], after_s: float, within_s: float
) -> tuple[float, float] | None:
    """When the server first said that it is not ready, and when that it is again (0: not yet); None: nothing was noticed.

    An absence that fell between two answers is taken to be as long as the longest time without one.
    """
    later = [answer for answer in answers if answer[0] > after_s]
    gone = next(
        (i for i, (at_s, ready) in enumerate(later) if not ready and at_s <= after_s + within_s), None
    )
    if gone is not None:
        return later[gone][0], next((at_s for at_s, ready in later[gone:] if ready), 0.0)
    if not later or later[-1][0] < after_s + within_s:
        return None
    times_s = [after_s, *(at_s for at_s, _ in later if at_s <= after_s + within_s)]
    return max(pairwise(times_s), key=lambda pair: pair[1] - pair[0])


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[Server]:
    """`degas serve` with these flags on free ports, from its readiness to its end. Raises RuntimeError if it does not start."""
    with TemporaryDirectory(prefix="degas-chaos-") as folder_name:
        folder = Path(folder_name)
        status, log = folder / "status.json", folder / LOG
        command = [sys.executable, "-m", "degas", "serve", "--port", "0", "--grpc-port", "none"]
        command += ["--report", "true", "--status-file", str(status), "--log-level", "error", *flags]
        with log.open("wb") as output:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            yield Server(_wait_started(child, log), child.pid, status)
        except BaseException:
            sys.stderr.write(log.read_text(errors="replace")[-3000:])
            raise
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()  # what it started dies with it
                child.wait()


def _wait_started(child: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and child.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith(READY_LINE):
                return str(json.loads(line.removeprefix(READY_LINE))["url"])
        time.sleep(0.05)
    raise RuntimeError("degas serve did not become ready")


def _count(pid: int, what: str) -> int:
    return len(os.listdir(f"/proc/{pid}/{what}"))


def sums_by_name(text: str) -> dict[str, float]:
    """Prometheus lines by name, labels left out; those of one name are added."""
    figures: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            figures[name] = figures.get(name, 0.0) + float(value)
    return figures
