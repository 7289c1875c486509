"""Three workers and two gateways behind the proxy: scaled up and down, and restarted one by one while clients are served."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.docker.services import START_S, Services, docker, healthy, missing, services, wait_for
from tests.docker.test_services import counting, last_of
from tests.http_client import Opened, ask

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(1900)]
NUM_CLIENTS = 12


@pytest.fixture(scope="module")
def scaled() -> Iterator[Services]:
    words = ("--scale", "worker=3", "--scale", "gateway=2")
    files = ("deploy/compose.scale.yaml",)
    Services("build", *files).build()
    with services("scaled", *words, files=files, DEGAS_MODEL="sim", DEGAS_DEVICE="sim") as project:
        project.wait_ready()
        yield project


class Load:
    """Clients that ask one question after the other; half of them stream."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(NUM_CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                self.outcomes[self._once(number % 2 == 0)] += 1
            except Exception as error:
                self.outcomes[repr(error)[:120]] += 1

    def _once(self, streams: bool) -> str:
        if not streams:
            answer = ask(self._url, "/v1/completions", counting(40, stream=False))
            return "ok" if answer.status == 200 else f"{answer.status} {answer.body[:100]!r}"
        with Opened(self._url, "/v1/completions", counting(40)) as opened:
            last = last_of(opened)
            return "ok" if last.get("choices", [{}])[0].get("finish_reason") == "length" else str(last)[:120]


def restart_one_by_one(project: Services, service: str) -> None:
    for container in project.containers(service):
        docker("restart", "-t", "45", container)
        wait_for(partial(healthy, container), START_S)
        time.sleep(3.0)  # until names and health checks have seen it


@pytest.mark.parametrize("service", ["worker", "gateway"])
def test_restarting_one_after_the_other_fails_no_request(scaled: Services, service: str) -> None:
    with Load(scaled.url) as load:
        time.sleep(1.0)
        restart_one_by_one(scaled, service)
    assert set(load.outcomes) == {"ok"} and load.outcomes["ok"] > 10 * NUM_CLIENTS, load.outcomes


def has_workers_up(project: Services, number: int) -> bool:
    metrics = project.inside(
        "gateway",
        "python",
        "-c",
        "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8080/metrics').read().decode())",
    )
    up = [line for line in metrics.splitlines() if line.startswith("degas_worker_up{")]
    return sum(line.endswith(" 1.0") for line in up) == number


def test_workers_are_found_and_forgotten_without_a_restart_of_gateways(scaled: Services) -> None:
    started = scaled.up_since("gateway")
    for number in (4, 2, 3):
        scaled.up("--scale", f"worker={number}", "--scale", "gateway=2", "--no-recreate")
        wait_for(partial(has_workers_up, scaled, number), START_S)
    assert scaled.up_since("gateway") == started


def test_a_stopped_proxy_lets_streams_end(scaled: Services) -> None:
    with ThreadPoolExecutor(1) as pool, Opened(scaled.url, "/v1/completions", counting(1500)) as opened:
        next(opened.events())
        stopping = pool.submit(scaled.compose, "stop", "proxy")
        assert last_of(opened)["choices"][0]["finish_reason"] == "length"
        stopping.result()
    (proxy,) = scaled.compose("ps", "-aq", "proxy").split()
    assert docker("inspect", "-f", "{{.State.ExitCode}}", proxy) == "0"
    scaled.compose("start", "proxy")
    scaled.wait_ready()


def test_grpc_goes_through_the_proxy_as_well(scaled: Services) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{scaled.grpc_port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
