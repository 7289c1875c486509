"""Owns the confinement of a process that does untrusted work: bounded memory, no files, jobs from stdin. Any child.

Its parent starts it as `python -m <module> <memory bytes>` and kills it when a job takes too long.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import BinaryIO


def confine(memory_bytes: int) -> None:
    """No allocation beyond this, no core dumps, no new files worth mentioning."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def run_confined(serve: Callable[[BinaryIO, BinaryIO], None]) -> None:
    """Entry point of such a process: `serve(stdin, stdout)` until stdin ends."""
    confine(int(sys.argv[1]))
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # the parent is going, or gone
