"""Owns an engine's process from the parent's side: start, ask with a time limit, pause, stop. The parent's main thread.

Processes are started in sessions of their own and signalled by the ids known from there, never by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

STOP_TIMEOUT_S: Final = 10.0
_LOADTEST: Final = Path(__file__).resolve().parent.parent


def end_on_sigterm() -> None:
    """Have SIGTERM end this process as an exit does, so that what it started is stopped on the way. Main thread."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


class PeerError(RuntimeError):
    """A peer that cannot be compared, in one line: not installed, failed, or hung."""


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def pinned(cores: list[int]) -> Iterator[None]:
    """Processes that are started inside the block may run on these cores only; an empty list: on all."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment(python: str, threads: int, scratch: Path) -> dict[str, str]:
    """The variables for an engine: its thread count, no network, and this package alone where `python` is another's.

    `scratch` keeps the folder by which a foreign environment finds `loadtest`, and nothing else of the project.
    """
    count = str(threads)
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if python == sys.executable:
        found = os.environ.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([str(_LOADTEST.parent), *([found] if found else [])])
    else:
        scratch.mkdir(parents=True, exist_ok=True)
        link = scratch / "loadtest"
        if not link.exists():
            link.symlink_to(_LOADTEST)
        variables["PYTHONPATH"] = str(scratch)
    variables["PYTHONSAFEPATH"] = "1"
    return variables


def start(command: list[str], variables: dict[str, str], log: Path, cores: list[int], *, piped: bool) -> Any:
    """Start a process in a session of its own. Raises PeerError when the program is not there."""
    pipe = subprocess.PIPE if piped else subprocess.DEVNULL
    with log.open("ab") as output, pinned(cores):
        try:
            return subprocess.Popen(
                command,
                env=variables,
                stdin=pipe,
                stdout=pipe if piped else output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerError(f"cannot start {command[0]}: {error.strerror}") from None


def stop(child: subprocess.Popen[bytes], *, patience_s: float = STOP_TIMEOUT_S) -> None:
    """Ask the process to end, then kill it and what it started; returns when it is gone."""
    for number in (signal.SIGCONT, signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
    try:
        child.wait(patience_s)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def last_words(log: Path) -> str:
    """The last line of a log, for a one-line report."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


class PeerProcess:
    """One engine in its own process, speaking `loadtest.peers.side`'s protocol."""

    def __init__(
        self, name: str, command: list[str], variables: dict[str, str], log: Path, cores: list[int]
    ) -> None:
        """Start it. Raises PeerError when its program is not there."""
        self.name = name
        self._log = log
        self._child: subprocess.Popen[bytes] = start(command, variables, log, cores, piped=True)
        self._pending = b""

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._child.pid

    def ask(self, op: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """One request and its answer. Raises PeerError on an error, a closed pipe, or after `timeout_s`; the process
        is gone then."""
        try:
            return self._ask(op, timeout_s, fields)
        except PeerError:
            self.stop()
            raise

    def _ask(self, op: str, timeout_s: float, fields: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self.name} ended: {last_words(self._log)}") from None
        answer: dict[str, Any] = json.loads(self._read_line(op, time.monotonic() + timeout_s, timeout_s))
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def _read_line(self, op: str, deadline_s: float, timeout_s: float) -> bytes:
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        while b"\n" not in self._pending:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
                raise PeerError(f"{self.name} did not answer {op!r} within {timeout_s:g} s and was killed")
            data = os.read(descriptor, 1 << 16)
            if not data:
                self._child.wait(STOP_TIMEOUT_S)
                raise PeerError(f"{self.name} ended: {last_words(self._log)}")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def pause(self) -> None:
        """Stop the process (SIGSTOP), so that its idle threads take no time from the others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the paused process go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def stop(self) -> None:
        """End the process; safe to call again."""
        if self._child.returncode is None:
            stop(self._child, patience_s=0.5)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
