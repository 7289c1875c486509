"""Owns the supervisor's side of the nursery, a process that has loaded the worker's libraries: workers are forked from it.

Runs on the supervisor's loop. Linux only; whatever goes wrong with it, a worker is started in the ordinary way.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Final

PR_SET_CHILD_SUBREAPER: Final = 36
LOAD_TIMEOUT_S: Final = 120.0
FORK_TIMEOUT_S: Final = 10.0
COMMAND: Final = (sys.executable, "-m", "degas.rooms", "degas.nursery")


class Forked:
    """A process that became our child by its parent's death; as much of `subprocess.Popen` as `Child` uses."""

    def __init__(self, pid: int, stdout: IO[bytes]) -> None:
        self.pid = pid
        self.stdout = stdout

    def wait(self) -> int:
        """Block until it has ended; its exit code, negative for a signal. Call once."""
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            return 1

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError when it is gone."""
        os.kill(self.pid, number)


class Nursery:
    """Starts at once; `fork` waits until it has loaded. A nursery that ended is started again at the next `fork`."""

    def __init__(self, environment: Mapping[str, str], leash: tuple[str, ...]) -> None:
        # With more than one thread it could not be forked, and numpy's library starts some when it is loaded.
        self._environment = {**environment, "OPENBLAS_NUM_THREADS": "1"}
        self._leash = leash
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._loaded = False
        self.failed = not adopt_orphans()

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start loading, unless that is under way or done."""
        if self.failed or self.pid is not None:
            return
        self._drop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The padding leaves room for the title that a worker gives itself.
        command = [*self._leash, str(os.getpid()), *COMMAND, str(theirs.fileno()), "nursery".ljust(16, ".")]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        except OSError:
            self.failed = True
            ours.close()
            return
        finally:
            theirs.close()
        ours.setblocking(False)
        self._channel = ours

    async def fork(self, environment: Mapping[str, str], beat_fd: int, beat_variable: str) -> Forked | None:
        """A worker with this environment; None where there is none to be had."""
        self.start()
        channel = self._channel
        if self.failed or channel is None:
            return None
        read_fd, write_fd = os.pipe()
        stdout = os.fdopen(read_fd, "rb", buffering=0)
        forked = None
        try:
            loop = asyncio.get_running_loop()
            if not self._loaded:
                async with asyncio.timeout(LOAD_TIMEOUT_S):
                    self._loaded = bool(await loop.sock_recv(channel, 64))
            if not self._loaded:
                raise ConnectionResetError
            request = {
                "environment": dict(environment),
                "beat_variable": beat_variable,
                "parent": os.getpid(),
            }
            socket.send_fds(channel, [json.dumps(request).encode()], [write_fd, beat_fd])
            async with asyncio.timeout(FORK_TIMEOUT_S):
                answer = await loop.sock_recv(channel, 256)
            forked = Forked(int(json.loads(answer)["pid"]), stdout)
            return forked
        except (OSError, ValueError, KeyError, TimeoutError):
            self.failed = not self._loaded  # it could not even load: the worker's own start will say why
            self.close()
            return None
        finally:
            os.close(write_fd)
            if forked is None:
                stdout.close()

    def close(self) -> None:
        """End it; workers that were forked from it go on."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._drop()

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel, self._process, self._loaded = None, None, False


def adopt_orphans() -> bool:
    """From now on descendants whose parents die become our children. False where the system knows no such thing."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def reap_orphans(own: Collection[int]) -> int:
    """Collect the exit codes of children that ended, which others than we had started; returns how many."""
    num_reaped = 0
    try:
        lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    except OSError:
        return 0
    for pid in {int(word) for text in lists for word in text.split()}.difference(own):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                num_reaped += os.waitpid(pid, os.WNOHANG)[0] == pid
        except (OSError, IndexError):
            continue
    return num_reaped
