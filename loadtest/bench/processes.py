"""Owns the real worker and gateway processes of a benchmark, and a lease of its own to read their heartbeats.

Runs in the benchmark's main thread; processes are started here and stopped here, by pid.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from loadtest.peers.process import free_port
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

START_TIMEOUT_S = 120.0


class WorkerProbe:
    """A second lease-holder beside the gateway: reads `Beat`s straight from the worker."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self.ready = self._say_hello()

    def _say_hello(self) -> Ready:
        hello = encode(Hello(PROTOCOL_VERSION, schema_hash(), "bench", 30.0))
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            self._socket.send(hello)
            if self._socket.poll(500):
                message = decode_from_worker(self._socket.recv_multipart()[0])
                if isinstance(message, Ready):
                    return message
                if isinstance(message, Fatal):
                    raise RuntimeError(message.message)
        raise TimeoutError("the worker did not answer hello")

    def beat(self) -> Beat:
        """The next heartbeat sent from now on."""
        while self._socket.poll(0):
            self._socket.recv_multipart()
        self._socket.send(encode(Ping(self.ready.epoch)))
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            if self._socket.poll(1000):
                message = decode_from_worker(self._socket.recv_multipart()[0])
                if isinstance(message, Beat):
                    return message
        raise TimeoutError("the worker's decode thread is silent")

    def trace(self, num_steps: int) -> bytes:
        """Record the worker's next steps; returns the Chrome-trace JSON."""
        self._socket.send(encode(Trace(num_steps)))
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            if self._socket.poll(1000):
                frames = self._socket.recv_multipart()
                if isinstance(decode_from_worker(frames[0]), TraceChunk):
                    return frames[1]
        raise TimeoutError("no recording came back; are there streams to record?")

    def close(self) -> None:
        """Close the socket, which ends the lease."""
        self._socket.close()
        self._context.term()


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child process, stopped (then killed) on the way out."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        yield child
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
        with (
            running(worker, {}, folder / "worker.log"),
            running([sys.executable, "-m", "degas.rooms", "gateway"], settings, folder / "gateway.log"),
        ):
            url = f"http://127.0.0.1:{port}"
            try:
                probe = WorkerProbe(endpoint)
                wait_ready(url)
            except Exception:
                for name in ("worker.log", "gateway.log"):
                    sys.stderr.write((folder / name).read_text()[-2000:])
                raise
            try:
                yield url, probe
            finally:
                probe.close()


def gateway_and_worker() -> tuple[int, int]:
    """The pids of the gateway and the worker among this process's own children."""
    found = {}
    for task in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        command = Path(f"/proc/{task}/cmdline").read_bytes().split(b"\0")
        for name in (b"gateway", b"worker"):
            if name in command:
                found[name] = int(task)
    return found[b"gateway"], found[b"worker"]


def wait_ready(url: str) -> None:
    """Poll readiness. Raises TimeoutError."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2) as response:
                if response.status == 200:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{url}/readyz does not become ready")
        time.sleep(0.05)
