"""Owns processes that do untrusted work: bounded memory, no files, no environment, and the pipe to their parent.

A parent starts one as `command(module, memory_bytes)` with `environment()` and kills it when a job takes too long. A
message, either way, is two lengths, a msgpack header, and a raw payload that may be empty; nothing is pickled.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO, Final

PREFIX: Final = struct.Struct("<II")  # header bytes, payload bytes


def command(module: str, memory_bytes: int) -> list[str]:
    """How a parent starts the module in a process of so much memory at most."""
    # -P: the folder we were started from may hold a `gateway` or `worker` of its own.
    return [sys.executable, "-P", "-m", module, str(memory_bytes)]


def environment() -> dict[str, str]:
    """The process's variables: the import path and nothing else, so no keys and no proxies."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "LC_ALL": "C.UTF-8"}


def pack(header: bytes, payload_bytes: int = 0) -> bytes:
    """The beginning of a message: its lengths and its header; `payload_bytes` of payload follow."""
    return PREFIX.pack(len(header), payload_bytes) + header


def read(stream: BinaryIO) -> tuple[bytes, bytes] | None:
    """The next message, header and payload; None at the end of the stream. Blocks."""
    prefix = stream.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        return None
    header_bytes, payload_bytes = PREFIX.unpack(prefix)
    return stream.read(header_bytes), stream.read(payload_bytes)


def write(stream: BinaryIO, header: bytes, *payload: bytes) -> None:
    """Send a message; the parts of its payload are written one after the other. Blocks."""
    stream.write(pack(header, sum(len(part) for part in payload)))
    for part in payload:
        stream.write(part)
    stream.flush()


def confine(memory_bytes: int) -> None:
    """Limit this process: no allocation beyond `memory_bytes`, no core dumps, nothing written to files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def run_confined(serve: Callable[[BinaryIO, BinaryIO], None]) -> None:
    """Entry point of such a process: `serve(stdin, stdout)` until stdin ends."""
    confine(int(sys.argv[1]))
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # the parent is ending or has ended
