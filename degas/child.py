"""Owns one child process: its group, its output lines, its heartbeat, its end. Runs on the supervisor's loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from struct import Struct
from typing import IO, Final, NamedTuple, Protocol

from degas.forks import Nursery

LEASH: Final = Path(__file__).with_name("leash.py")
GUARD: Final = Path(__file__).with_name("guard.py")
SCRIPT: Final = (sys.executable, "-I", "-S")  # start in milliseconds: no site, no user settings

MAX_LINE_BYTES: Final = 1 << 20
STACKS_S: Final = 0.2
OUTPUT_S: Final = 1.0


class Guard:
    """The supervisor's end of the guard process: tells it what would have to be cleaned up."""

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def __init__(self, *, apart: bool = False) -> None:
        """`apart`: it is to outlive somebody who kills all our children; `pid` is then that of nobody any more."""
        self._process = subprocess.Popen(
            [*SCRIPT, str(GUARD), *(["apart"] if apart else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        if apart:
            self._process.wait()

    def say(self, line: str) -> None:
        """Send the guard one line. A guard that has died is no reason to fail."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass

    def close(self) -> None:
        """Tell the guard that everything is cleaned up, so that it ends."""
        self.say("done")
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.wait()


_BEAT: Final = Struct("<Qd")


class Beat(NamedTuple):
    """What a worker writes as its sign of life: a number that changes with every heartbeat, and how long it may now be silent."""

    number: int = 0
    patience_s: float = 3.0


class Process(Protocol):
    """What a child needs of its process: a `subprocess.Popen`, or one that was forked for us."""

    @property
    def pid(self) -> int:
        """Its id."""

    @property
    def stdout(self) -> IO[bytes] | None:
        """Its output."""

    def wait(self) -> int:
        """Block until it has ended; its exit code."""

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError when it is gone."""


class Child:
    """A running child, leader of its own process group and session."""

    def __init__(self, process: Process, guard: Guard, beat_fd: int, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._guard = guard
        self._beat_fd = beat_fd
        self._output = asyncio.create_task(_read_lines(process, on_line), name=f"output-{process.pid}")
        self.exited: asyncio.Task[int] = asyncio.create_task(self._wait(), name=f"child-{process.pid}")

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        guard: Guard,
        on_line: Callable[[str], None],
        beat_variable: str | None = None,
    ) -> Child:
        """Start a command; its stdout goes to `on_line`, line by line, its stderr where ours goes."""
        environment = dict(environment)
        beat_fd = -1
        if beat_variable is not None:
            beat_fd = _open_beat()
            environment[beat_variable] = str(beat_fd)
        try:
            # Not asyncio's subprocess: its wait() ends only when the pipe does, and a descendant may hold the pipe open.
            process = subprocess.Popen(
                [*SCRIPT, str(LEASH), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
                pass_fds=(beat_fd,) if beat_fd >= 0 else (),
            )
        except BaseException:
            if beat_fd >= 0:
                os.close(beat_fd)
            raise
        guard.say(f"watch {process.pid}")
        return cls(process, guard, beat_fd, on_line)

    @classmethod
    async def fork(
        cls,
        nursery: Nursery,
        environment: Mapping[str, str],
        *,
        guard: Guard,
        on_line: Callable[[str], None],
        beat_variable: str,
    ) -> Child | None:
        """The same for a worker, in milliseconds; None where the nursery has none."""
        beat_fd = _open_beat()
        process = None
        try:
            process = await nursery.fork(environment, beat_fd, beat_variable)
        finally:
            if process is None:
                os.close(beat_fd)
        if process is None:
            return None
        guard.say(f"watch {process.pid}")
        return cls(process, guard, beat_fd, on_line)

    @property
    def pid(self) -> int:
        """The child's process id, which is also its group's."""
        return self._process.pid

    def beat(self) -> Beat:
        """The child's last heartbeat."""
        data = os.pread(self._beat_fd, _BEAT.size, 0) if self._beat_fd >= 0 else b""
        return Beat(*_BEAT.unpack(data)) if len(data) == _BEAT.size else Beat()

    def kill(self) -> None:
        """Kill the child and everything it started, now."""
        _signal_group(self.pid, signal.SIGKILL)

    async def stop(self, grace_s: float, cut_short: asyncio.Event) -> bool:
        """Ask the child to end; kill it after the grace, or as soon as `cut_short` is set. True if it ended by itself."""
        if not self.exited.done():
            try:
                self._process.send_signal(signal.SIGTERM)
            except ProcessLookupError:
                pass
        cut = asyncio.create_task(cut_short.wait())
        await asyncio.wait((self.exited, cut), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        cut.cancel()
        by_itself = self.exited.done()
        if not by_itself:
            self.kill()
        await self.exited
        return by_itself

    async def kill_hung(self) -> None:
        """Kill the child after asking for its threads' stacks: faulthandler answers SIGUSR1 even when Python is stuck."""
        try:
            self._process.send_signal(signal.SIGUSR1)
        except ProcessLookupError:
            pass
        await asyncio.wait((self.exited,), timeout=STACKS_S)
        self.kill()
        await self.exited

    async def _wait(self) -> int:
        code = await asyncio.to_thread(self._process.wait)
        self.kill()  # whatever it left behind in its group
        await asyncio.wait((self._output,), timeout=OUTPUT_S)
        self._output.cancel()
        self._guard.say(f"forget {self.pid}")
        if self._beat_fd >= 0:
            os.close(self._beat_fd)
            self._beat_fd = -1
        return code


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _open_beat() -> int:
    """An anonymous file that both processes see: written with pwrite, read with pread, never in the way."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("degas-beat")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


async def _read_lines(process: Process, on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    stream = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), process.stdout
    )
    try:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                continue  # a line beyond the limit is dropped by the reader
            if not line:
                return
            on_line(line.decode(errors="replace").rstrip("\r\n"))
    finally:
        pipe.close()
