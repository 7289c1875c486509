"""Owns waiting for what processes should do: it ends as soon as one of them has ended, with what that one said last.

Used by benchmarks and by tests that start processes. Any thread.
"""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

START_TIMEOUT_S: Final = 120.0
POLL_S: Final = 0.02
NUM_LINES: Final = 30  # of a log, in an error


@dataclass(frozen=True, slots=True)
class Watched:
    """A process that something is expected of, and the file that its output goes to."""

    name: str
    process: subprocess.Popen[Any]
    log: Path

    def last_lines(self) -> str:
        """What it said last."""
        try:
            lines = self.log.read_text(errors="replace").rstrip().splitlines()
        except OSError as error:
            return f"(no log: {error.strerror})"
        return "\n".join(lines[-NUM_LINES:]) or "(it said nothing)"


class ProcessEnded(RuntimeError):
    """A process has ended of which something was still expected."""

    def __init__(self, watched: Watched, what: str) -> None:
        code = watched.process.poll()
        super().__init__(
            f"{watched.name} ended with exit code {code}, before this: {what}. The last it said:\n{watched.last_lines()}"
        )
        self.watched = watched


def wait_until(
    condition: Callable[[], T | None],
    what: str,
    processes: Sequence[Watched] = (),
    *,
    timeout_s: float = START_TIMEOUT_S,
) -> T:
    """Poll until the condition gives something true, and return that. `what` names it in errors.

    Raises ProcessEnded as soon as one of the processes has ended without it, and TimeoutError with the last log lines
    of all of them.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        ended = [watched for watched in processes if watched.process.poll() is not None]
        found = condition()
        if found:  # what a process did before it ended counts
            return found
        if ended:
            raise ProcessEnded(ended[0], what)
        if time.monotonic() > deadline_s:
            said = "".join(f"\n{watched.name} said:\n{watched.last_lines()}" for watched in processes)
            raise TimeoutError(f"waited {timeout_s:g} s in vain for this: {what}{said}")
        time.sleep(POLL_S)


def answers(url: str) -> bool:
    """Whether a GET of this address gives 200 now."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_ready(
    url: str, processes: Sequence[Watched] = (), *, path: str = "/readyz", timeout_s: float = START_TIMEOUT_S
) -> None:
    """Wait until a server is ready. Raises as `wait_until` does."""
    wait_until(lambda: answers(url + path), f"{url}{path} answers 200", processes, timeout_s=timeout_s)
