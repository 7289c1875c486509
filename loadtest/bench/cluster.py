"""Owns a gateway over several real workers of a benchmark or test, each with flags of its own. Main thread; ended by pid."""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.processes import running
from loadtest.peers.process import free_port
from loadtest.peers.waiting import Watched, wait_ready, wait_until


@dataclass(frozen=True, slots=True)
class Cluster:
    """The gateway's address, and the processes by name, `gateway` among them."""

    url: str
    processes: Mapping[str, Watched]

    def metrics(self) -> dict[str, float]:
        """Every sample of the gateway's metrics, by its name with labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def post(self, path: str, body: Mapping[str, object], timeout_s: float = 60.0) -> dict[str, object]:
        """A JSON answer. Raises `urllib.error.HTTPError`."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            found: dict[str, object] = json.load(answer)
        return found

    def num_up(self) -> int:
        """Workers that the gateway is connected to."""
        return round(sum(v for name, v in self.metrics().items() if name.startswith("degas_worker_up{")))

    def wait_up(self, num_workers: int) -> None:
        """Wait until so many workers are there. Raises as `wait_until` does."""
        wait_until(
            lambda: self.num_up() == num_workers,
            f"{num_workers} workers are up",
            list(self.processes.values()),
        )


@contextmanager
def cluster(
    workers: Mapping[str, Sequence[str]],
    *,
    gateway_settings: Mapping[str, str] | None = None,
    curve_key_dir: Path | None = None,
) -> Iterator[Cluster]:
    """Workers by name with their flags, over `ipc://`, or over `tcp://` on loopback with the keys of a folder."""
    with tempfile.TemporaryDirectory(prefix="degas-bench-") as folder_name, ExitStack() as stack:
        folder = Path(folder_name)
        keys = [] if curve_key_dir is None else ["--curve-key-dir", str(curve_key_dir)]
        endpoints = {
            name: f"ipc://{folder}/{name}.sock" if not keys else f"tcp://127.0.0.1:{free_port()}"
            for name in workers
        }
        processes: dict[str, Watched] = {}
        for name, flags in workers.items():
            command = [sys.executable, "-m", "degas.rooms", "worker", "--endpoint", endpoints[name]]
            command += ["--log-level", "warning", *keys, *flags]
            processes[name] = stack.enter_context(running(name, command, {}, folder / f"{name}.log"))
        port = free_port()
        settings = {
            "DEGAS_GATEWAY_WORKERS": ",".join(endpoints.values()),
            "DEGAS_GATEWAY_PORT": str(port),
            "DEGAS_GATEWAY_LOG_LEVEL": "warning",
            "DEGAS_GATEWAY_MAX_QUEUE": "4096",
            **({} if curve_key_dir is None else {"DEGAS_GATEWAY_CURVE_KEY_DIR": str(curve_key_dir)}),
            **(gateway_settings or {}),
        }
        gateway = [sys.executable, "-m", "degas.rooms", "gateway"]
        processes["gateway"] = stack.enter_context(
            running("gateway", gateway, settings, folder / "gateway.log")
        )
        made = Cluster(f"http://127.0.0.1:{port}", processes)
        wait_ready(made.url, list(processes.values()))
        made.wait_up(len(workers))
        yield made
