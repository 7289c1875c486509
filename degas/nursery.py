"""Owns a process that has loaded the worker's libraries and becomes no worker itself: workers are forked from it.

`degas.forks` is the supervisor's side. Loading torch takes seconds, a fork milliseconds: so a worker that died is replaced
in the time that its weights take. One thread, as a fork asks; nothing that a fork would share is opened here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1
MAX_MESSAGE_BYTES: Final = 1 << 17
NUM_FDS: Final = 2  # the worker's standard output and the file of its heartbeat
TITLE: Final = ("-m", "degas.rooms", "worker")
MODULES: Final = ("worker.__main__", "worker.startup", "worker.formats.source")
"""What a worker imports until it serves; the rest comes with these."""


def main() -> None:
    """Load, say so on the socket whose descriptor is the only argument, and fork a worker for each message there."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        for module in MODULES:
            import_module(module)
    except Exception:
        sys.exit(1)  # a worker started in the ordinary way meets the same, and says what to do about it
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("a library has started a thread of its own, so no worker can be forked")
    gc.collect()
    gc.freeze()  # or the children's first collection would copy every page
    channel.send(b"loaded")
    while True:
        data, fds, _, _ = socket.recv_fds(channel, MAX_MESSAGE_BYTES, NUM_FDS)
        if not data:
            return  # the supervisor is gone
        between = os.fork()
        if between == 0:
            if os.fork() != 0:
                os._exit(0)  # so that the worker becomes a child of the supervisor, which takes in orphans
            _become_worker(channel, json.loads(data), fds)
            return
        os.waitpid(between, 0)
        for fd in fds:
            os.close(fd)


def _become_worker(channel: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    """Run the worker in this process, as the process that `degas.child` would have started."""
    os.setsid()
    until_s = time.monotonic() + 2.0
    while os.getppid() != request["parent"]:
        if time.monotonic() > until_s:
            os._exit(1)
        time.sleep(0.0005)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != request["parent"]:
        os._exit(1)  # it died before the signal was armed
    channel.send(json.dumps({"pid": os.getpid()}).encode())
    channel.close()
    output, beat = fds
    os.dup2(output, 1)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ[request["beat_variable"]] = str(beat)
    _entitle()
    sys.argv = ["degas worker"]
    run = import_module("worker.__main__").run
    sys.exit(run({}, None))


def _entitle() -> None:
    """Show in lists of processes what this one is now, by writing over the arguments that the kernel shows."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end: fields 48 and 49, proc(5)
        title = "\0".join((sys.executable, *TITLE)).encode() + b"\0"
        if 0 < len(title) <= end - start:
            ctypes.memmove(start, title.ljust(end - start, b"\0"), end - start)
    except (OSError, ValueError, IndexError):
        pass  # only the name is another


if __name__ == "__main__":
    main()
