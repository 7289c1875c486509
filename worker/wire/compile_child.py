"""Owns one compiling process as its parent sees it: started when needed, asked, replaced when it died. A compiler thread, but
for `kill`."""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import Final

import msgspec

from shared import confined
from shared.forked_jobs import CUT, DONE, Job, Outcome
from shared.grammars import GrammarError
from shared.protocol import Grammar
from worker.wire.compiler_process import Answer, Setup

START_TIMEOUT_S: Final = 120.0
PATIENCE: Final = 15.0  # times the CPU time, on the clock: beyond, the machine or the process is stuck
PROCESS_BYTES: Final = 3 << 30

_decode_outcome = msgspec.msgpack.Decoder(Outcome).decode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


class Cut(Exception):
    """A grammar needs more CPU time than it was given."""


class CompilerProcess:
    """The process, which forks for each grammar."""

    def __init__(self, setup: Setup, *, patience: float = PATIENCE) -> None:
        self._setup = msgspec.msgpack.encode(setup)
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    @property
    def pid(self) -> int | None:
        """Its process id, if it runs."""
        return None if self._process is None else self._process.pid

    def ask(self, grammar: Grammar, cpu_s: float) -> Answer:
        """Compile there. Raises `Cut` at the limit of CPU time, and `GrammarError` when the process was lost twice."""
        for _ in range(2):
            if self._killed:
                break
            try:
                if self._process is None or self._process.poll() is not None:
                    self.start()
                body = msgspec.msgpack.encode(grammar)
                header, answer = self._exchange(
                    msgspec.msgpack.encode(Job(cpu_s)), body, cpu_s * self._patience
                )
            except (OSError, EOFError):  # TimeoutError among them
                self.end()
                continue
            outcome = _decode_outcome(header)
            if outcome.how == CUT:
                raise Cut
            if outcome.how == DONE:
                return _decode_answer(answer)
        if self._killed:
            raise GrammarError("the worker is shutting down")
        raise GrammarError("compiling it takes more than it is allowed")

    def kill(self) -> None:
        """Kill it for good; the thread that waits for it sees its pipe end. Any thread."""
        self._killed = True
        process = self._process
        if process is not None:
            process.kill()

    def start(self) -> None:
        """Start it and give it the vocabulary. Raises TimeoutError, OSError or EOFError."""
        if self._killed:
            raise EOFError
        self.end()
        self._process = subprocess.Popen(
            confined.command("worker.wire.compiler_process", PROCESS_BYTES),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=confined.environment() | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            bufsize=0,
            start_new_session=True,  # a Ctrl-C at the terminal is the worker's to handle
        )
        self._kill_if_closing()  # `kill` may have seen no process yet
        self._exchange(b"", self._setup, START_TIMEOUT_S)

    def _kill_if_closing(self) -> None:
        if self._killed and self._process is not None:
            self._process.kill()

    def end(self) -> None:
        """Kill it, wait for it and close its pipes."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def _exchange(self, header: bytes, payload: bytes, timeout_s: float) -> tuple[bytes, bytes]:
        """One message there and its answer back. Raises TimeoutError, OSError or EOFError."""
        process = self._process
        if process is None:
            raise EOFError
        assert process.stdin is not None and process.stdout is not None
        # The process reads a whole message before it works on it, so writing does not wait for the work.
        view = memoryview(confined.pack(header, len(payload)) + payload)
        while view:
            view = view[process.stdin.write(view) or 0 :]
        until_s = time.monotonic() + timeout_s
        source = process.stdout.fileno()
        prefix = _read_exactly(source, confined.PREFIX.size, until_s)
        header_bytes, payload_bytes = confined.PREFIX.unpack(prefix)
        return _read_exactly(source, header_bytes, until_s), _read_exactly(source, payload_bytes, until_s)


def _read_exactly(source: int, size: int, until_s: float) -> bytes:
    parts: list[bytes] = []
    poller = select.poll()
    poller.register(source, select.POLLIN)
    while size:
        left_s = until_s - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise TimeoutError
        data = os.read(source, min(size, 1 << 20))
        if not data:
            raise EOFError
        parts.append(data)
        size -= len(data)
    return b"".join(parts)
