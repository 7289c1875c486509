"""Owns doing untrusted jobs one by one, each in a process of its own that is cut off at its limit of CPU time.

The server is a confined process that has loaded what the jobs need and forks for each of them: a job that is cut, or that
brings its process down, costs nothing but itself, and its memory is gone with it. CPU time and not the clock is what is
limited: on a starved machine a sound job takes long.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from typing import BinaryIO, Final

import msgspec

from shared.confined import read, write

DONE: Final = "done"
CUT: Final = "cut"
DIED: Final = "died"

Work = Callable[[bytes], bytes]


class Job(msgspec.Struct, array_like=True):
    """A job's message header; its body is the payload."""

    cpu_s: float


class Outcome(msgspec.Struct, array_like=True):
    """An answer's header: DONE with the answer as its payload, CUT at the limit of CPU time, or DIED of something else."""

    how: str
    cpu_s: float = 0.0
    signal: int = 0


def serve_forked(stdin: BinaryIO, stdout: BinaryIO, work: Work) -> None:
    """Answer jobs until stdin ends. The caller has loaded everything and runs a single thread."""
    decode = msgspec.msgpack.Decoder(Job).decode
    while message := read(stdin):
        outcome, data = run_forked(work, message[1], decode(message[0]).cpu_s)
        write(stdout, msgspec.msgpack.encode(outcome), data)


def run_forked(work: Work, body: bytes, cpu_s: float) -> tuple[Outcome, bytes]:
    """Do one job in a fork of this process, which runs a single thread."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        _work_and_exit(work, body, cpu_s, source, sink)
    os.close(sink)
    parts: list[bytes] = []
    while part := os.read(source, 1 << 20):
        parts.append(part)
    os.close(source)
    _, status, usage = os.wait4(child, 0)
    used_s = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Outcome(CUT if number == signal.SIGPROF else DIED, used_s, number), b""
    if os.WEXITSTATUS(status):
        return Outcome(DIED, used_s), b""
    return Outcome(DONE, used_s), b"".join(parts)


def _work_and_exit(work: Work, body: bytes, cpu_s: float, source: int, sink: int) -> None:
    """The child's whole life."""
    code = 1
    try:
        os.close(source)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # a forked process has no timers of its own yet
        view = memoryview(work(body))
        while view:
            view = view[os.write(sink, view) :]
        code = 0
    finally:
        os._exit(code)


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def bytes_in_use() -> int:
    """Memory this process has allocated and not freed, by the C library's own count where it has one (glibc)."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        with open("/proc/self/statm", encoding="ascii") as pages:
            return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    mallinfo.restype = _Mallinfo
    said = mallinfo()
    return int(said.uordblks + said.hblkhd)
