"""Owns the real worker and gateway processes of a benchmark, and a lease of its own to read their heartbeats.

Runs in the benchmark's main thread; processes are started here and stopped here, by pid.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import zmq

from loadtest.peers.process import free_port
from loadtest.peers.waiting import Watched, wait_ready, wait_until
from shared.protocol import (
    PROTOCOL_VERSION,
    Beat,
    Fatal,
    Hello,
    Ping,
    Ready,
    Trace,
    TraceChunk,
    decode_from_worker,
    encode,
    schema_hash,
)


class WorkerProbe:
    """A second lease-holder beside the gateway: reads `Beat`s straight from the worker.

    Every wait ends with an error when one of `processes` has ended.
    """

    def __init__(self, endpoint: str, processes: Sequence[Watched] = ()) -> None:
        self.endpoint = endpoint
        self._processes = processes
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        try:
            self.ready = wait_until(self._say_hello, "the worker answers hello", processes)
        except BaseException:
            self.close()
            raise

    def _say_hello(self) -> Ready | None:
        self._socket.send(encode(Hello(PROTOCOL_VERSION, schema_hash(), "bench", 30.0)))
        while self._socket.poll(250):
            message = decode_from_worker(self._socket.recv_multipart()[0])
            if isinstance(message, Ready):
                return message
            if isinstance(message, Fatal):
                raise RuntimeError(message.message)
        return None

    def beat(self) -> Beat:
        """The next heartbeat sent from now on."""
        while self._socket.poll(0):
            self._socket.recv_multipart()
        self._socket.send(encode(Ping(self.ready.epoch)))

        def received() -> Beat | None:
            while self._socket.poll(250):
                message = decode_from_worker(self._socket.recv_multipart()[0])
                if isinstance(message, Beat):
                    return message
            return None

        return wait_until(
            received, "the worker's decode thread sends a heartbeat", self._processes, timeout_s=10
        )

    def trace(self, num_steps: int) -> bytes:
        """Record the worker's next steps; returns the Chrome-trace JSON."""
        self._socket.send(encode(Trace(num_steps)))

        def received() -> bytes | None:
            while self._socket.poll(250):
                frames = self._socket.recv_multipart()
                if isinstance(decode_from_worker(frames[0]), TraceChunk):
                    return frames[1]
            return None

        what = "a recording comes back (it needs streams to record)"
        return wait_until(received, what, self._processes, timeout_s=30)

    def close(self) -> None:
        """Close the socket, which ends the lease."""
        self._socket.close()
        self._context.term()


@contextmanager
def running(name: str, command: list[str], environment: dict[str, str], log: Path) -> Iterator[Watched]:
    """A child process, stopped (then killed) on the way out."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        yield Watched(name, child, log)
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def serving(
    worker_flags: list[str], *, gateway_settings: dict[str, str] | None = None
) -> Iterator[tuple[str, WorkerProbe]]:
    """A worker with these flags behind a gateway; yields the gateway's address and a probe of the worker."""
    with tempfile.TemporaryDirectory(prefix="degas-bench-") as folder_name:
        folder = Path(folder_name)
        endpoint = f"ipc://{folder}/worker.sock"
        port = free_port()
        settings = {
            "DEGAS_GATEWAY_WORKERS": endpoint,
            "DEGAS_GATEWAY_PORT": str(port),
            "DEGAS_GATEWAY_LOG_LEVEL": "warning",
            "DEGAS_GATEWAY_MAX_QUEUE": "4096",
            **(gateway_settings or {}),
        }
        worker = [
            sys.executable,
            "-m",
            "degas.rooms",
            "worker",
            "--endpoint",
            endpoint,
            "--log-level",
            "warning",
            *worker_flags,
        ]
        gateway = [sys.executable, "-m", "degas.rooms", "gateway"]
        with (
            running("the worker", worker, {}, folder / "worker.log") as worker_process,
            running("the gateway", gateway, settings, folder / "gateway.log") as gateway_process,
        ):
            url = f"http://127.0.0.1:{port}"
            processes = (worker_process, gateway_process)
            probe = WorkerProbe(endpoint, processes)
            try:
                wait_ready(url, processes)
                yield url, probe
            finally:
                probe.close()


def gateway_and_worker() -> tuple[int, int]:
    """The pids of the gateway and the worker among this process's own children, whichever of its threads started them."""
    found = {}
    for children in Path("/proc/self/task").glob("*/children"):
        for task in children.read_text().split():
            command = Path(f"/proc/{task}/cmdline").read_bytes().split(b"\0")
            for name in (b"gateway", b"worker"):
                if name in command:
                    found[name] = int(task)
    return found[b"gateway"], found[b"worker"]
