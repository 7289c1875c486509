"""Owns reading what a served Degas holds: /proc of its processes, and its gateways' metrics. Blocking; run it on a thread."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loadtest.bench.chaos_server import Server, sums_by_name

TIMEOUT_S: Final = 5.0
HELPERS: Final = "helpers"
SUPERVISOR: Final = "supervisor"


@dataclass(frozen=True, slots=True)
class Holding:
    """One process' memory (anonymous pages in bytes: what it made itself, files it maps left out) and descriptors."""

    key: tuple[int, ...]  # its pid; of helpers all of theirs
    num_bytes: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything at one time; metrics are left at -1 while no gateway answers."""

    at_s: float
    posts: dict[str, Holding]
    zombies: int
    pages: int = -1  # of the worker in use
    requests: int = -1  # under way in all gateways
    sequences: int = -1  # running and waiting in the worker
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def is_calm(self) -> bool:
        """Whether nothing is under way anywhere."""
        return self.pages >= 0 and not (self.requests or self.sequences or self.zombies)


def read(server: Server) -> Reading:
    """Count now."""
    try:
        state = json.loads(server.status.read_text())
    except (OSError, ValueError):
        state = {}
    family = server.family()
    pids = {name: int(post["pid"]) for name, post in state.items() if post["ready"] and post["pid"]}
    pids[SUPERVISOR] = server.pid
    posts = {name: holding for name, pid in pids.items() if (holding := _holding(pid)) is not None}
    rest = sorted(pid for pid, (_, kind) in family.items() if pid not in pids.values() and kind != "Z")
    held = [holding for pid in rest if (holding := _holding(pid)) is not None]
    posts[HELPERS] = Holding(
        tuple(pid for one in held for pid in one.key),
        sum(one.num_bytes for one in held),
        sum(one.descriptors for one in held),
    )
    zombies = sum(kind == "Z" for _, kind in family.values())
    ports = {name: int(post["port"]) for name, post in state.items() if post["ready"] and "port" in post}
    try:
        told = [_metrics(port) for port in ports.values()]
        worker = told[0]
        return Reading(
            time.perf_counter(),
            posts,
            zombies,
            pages=int(worker["degas_worker_total_pages"] - worker["degas_worker_free_pages"]),
            requests=int(
                sum(one["degas_requests_in_flight"] + one["degas_requests_recovering"] for one in told)
            ),
            sequences=int(worker["degas_worker_num_running"] + worker["degas_worker_num_waiting"]),
            ports=ports,
        )
    except (OSError, KeyError, IndexError, ValueError):
        return Reading(time.perf_counter(), posts, zombies, ports=ports)


def _metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as reply:
        return sums_by_name(reply.read().decode())


def _holding(pid: int) -> Holding | None:
    """None when the process has gone meanwhile."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
    if kib is None:  # dead, and not yet collected
        return None
    return Holding((pid,), kib * 1024, descriptors)
