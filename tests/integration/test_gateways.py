"""Several gateways on one port over one worker: requests spread, a death costs its own clients only, the bound holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TypeVar

import pytest

from loadtest.peers.waiting import Watched, wait_until

pytestmark = pytest.mark.slow
ROWS, QUEUE = 4, 12

T = TypeVar("T")


class Server:
    """`degas serve --gateways 2` over the simulated device, by its status file."""

    def __init__(self, folder: Path) -> None:
        self.status_file, self.log = folder / "status.json", folder / "log"
        command = [sys.executable, "-m", "degas", "serve", "--device", "sim", "--sim-profile", "small"]
        command += ["--port", "0", "--grpc-port", "-1", "--gateways", "2", "--log-level", "warning"]
        command += ["--max-rows", str(ROWS), "--max-queue", str(QUEUE), "--report", "true"]
        command += ["--status-file", str(self.status_file), "--image-processes", "1"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.watched = [Watched("degas serve", self.process, self.log)]
        self.port = int(self.until(self._url, "ready").rpartition(":")[2])

    def _url(self) -> str | None:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("DEGAS-READY ")]
        return str(json.loads(lines[0].partition(" ")[2])["url"]) if lines else None

    def until(self, condition: Callable[[], T | None], what: str) -> T:
        return wait_until(condition, what, self.watched, timeout_s=60)

    def gateways(self) -> dict[str, dict[str, int]]:
        state = json.loads(self.status_file.read_text())
        return {name: post for name, post in state.items() if name.startswith("gateway")}

    def figures(self, port: int) -> dict[str, float]:
        """A gateway's metrics without their labels, by its own port."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found: defaultdict[str, float] = defaultdict(float)
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] += float(value)
        return dict(found)

    def ask(self, max_tokens: int, *, stream: bool = False) -> HTTPConnection:
        body: dict[str, object] = {
            "model": None,
            "messages": [{"role": "user", "content": "hi"}],
            "stream": stream,
        }
        body |= {"max_tokens": max_tokens, "ignore_eos": True}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        return connection


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("gateways"))
    yield made
    made.process.kill()
    made.process.wait()


def spread(server: Server) -> list[float]:
    return [
        server.figures(post["port"]).get("degas_requests_accepted_total", 0.0)
        for post in server.gateways().values()
    ]


def test_requests_spread_over_both_and_each_tells_its_own_figures(server: Server) -> None:
    assert [post["ready"] for post in server.gateways().values()] == [True, True]
    for _ in range(24):
        answer = server.ask(2).getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
    counts = spread(server)
    assert sum(counts) == 24 and min(counts) > 0  # by the kernel's hash of addresses: 2⁻²³ that one gets none


def test_together_they_keep_the_bound_and_neither_starves(server: Server) -> None:
    statuses: Counter[int] = Counter()
    most = 0

    def client() -> None:
        until_s = time.monotonic() + 3
        while time.monotonic() < until_s:
            answer = server.ask(40).getresponse()
            answer.read()
            statuses[answer.status] += 1

    before = spread(server)
    threads = [threading.Thread(target=client) for _ in range(40)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        held = [
            server.figures(post["port"])["degas_requests_in_flight"] for post in server.gateways().values()
        ]
        most = max(most, int(sum(held)))
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    # Scraped one after the other, and a heartbeat knows nothing of what is on its way; each for itself would hold all places.
    assert most <= ROWS + QUEUE + QUEUE // 2 < 2 * (ROWS + QUEUE)
    served = [now - then for now, then in zip(spread(server), before, strict=True)]
    assert min(served) > 0.2 * sum(served)


def test_a_dead_gateway_costs_its_own_clients_only_and_comes_back(server: Server) -> None:
    streams = [server.ask(1000, stream=True) for _ in range(4)]
    answers = [stream.getresponse() for stream in streams]
    for answer in answers:
        assert answer.status == 200 and answer.readline().startswith(b"data: ")
    first, second = server.gateways().values()
    held = int(server.figures(second["port"])["degas_requests_in_flight"])
    os.kill(first["pid"], signal.SIGKILL)
    whole = 0
    for answer in answers:
        try:
            whole += b"[DONE]" in answer.read()
        except (HTTPException, OSError):
            continue
    assert whole == held
    again = lambda: (post := server.gateways()["gateway"])["ready"] and post["pid"] != first["pid"]  # noqa: E731
    server.until(again, "it is started again")
    assert server.gateways()["gateway-2"]["pid"] == second["pid"]
    for _ in range(4):
        assert server.ask(2).getresponse().status == 200
    server.process.terminate()
    assert server.process.wait(30) == 0
