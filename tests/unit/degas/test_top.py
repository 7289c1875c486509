"""`degas top`: what two readings mean, how a frame looks, and servers that go away, come back, or want a key."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from degas.cli import app
from degas.top.command import Watch
from degas.top.figures import Figures, figures, quantile_ms
from degas.top.scrape import Samples, Scrape, check_url, parse
from degas.top.view import milliseconds, number, render, share

DATA = (
    Path(__file__).parents[2] / "data" / "top"
)  # two scrapes of a simulated device under `degas loadtest mixed`
URL = "http://127.0.0.1:8080"


def reading(name: str, at_s: float, url: str = URL) -> Scrape:
    models = ({"id": "sim", "family": "fake", "context_tokens": 16384, "takes_images": True},)
    return Scrape(url, at_s, parse((DATA / name).read_text()), models)


def recorded() -> Figures:
    return figures([reading("after.txt", 12.0)], {URL: reading("before.txt", 10.0)})


def text_of(shown: Figures, width: int = 80) -> str:
    console = Console(record=True, width=width, force_terminal=False, file=io.StringIO())
    console.print(render(shown, "12:00:00"))
    return console.export_text()


def test_figures_are_those_of_the_time_between_two_readings() -> None:
    before, after = reading("before.txt", 10.0), reading("after.txt", 12.0)
    shown = recorded()
    gateway, worker = shown.gateways[0], shown.workers[0]

    def grown(name: str) -> float:
        then, now = before.total(name), after.total(name)
        assert then is not None and now is not None
        return now - then

    steps = grown("degas_worker_steps_total")
    assert gateway.requests_per_s == pytest.approx(grown("degas_requests_accepted_total") / 2)
    assert worker.step_ms == pytest.approx(1e3 * grown("degas_worker_device_busy_seconds_total") / steps)
    assert worker.host_ms == pytest.approx(1e3 * grown("degas_worker_host_seconds_total") / steps)
    assert worker.tokens_per_s == pytest.approx(
        grown("degas_worker_generation_tokens_total") / grown("degas_worker_loop_seconds_total")
    )
    # Gateway and worker count the same tokens, at slightly different times.
    assert gateway.tokens_per_s == pytest.approx(worker.tokens_per_s, rel=0.4)
    assert worker.bubble_share is not None and 0 < worker.bubble_share < 1
    assert worker.pages == 4095 and 0 < worker.pages_used < 4095
    assert (worker.model, worker.device) == ("sim", "sim:b200")
    assert shown.models[0].tokens_per_currency is not None and shown.models[0].joules_per_token is None


@pytest.mark.parametrize("width", [80, 160])
def test_a_frame_fits_and_cuts_nothing(width: int) -> None:
    away = Scrape("http://127.0.0.1:9", 12.0, error="does not answer: Connection refused")
    shown = figures([reading("after.txt", 12.0), away], {URL: reading("before.txt", 10.0)})
    text = text_of(shown, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for said in (
        "over the last 2.0 s",
        "bubble",
        "prefix",
        "sim:b200",
        "Connection refused",
        "per currency unit",
        "key-2",
    ):
        assert said in text
    assert " nan" not in text and " -" not in text.replace(" --", "")


def test_what_is_not_known_is_a_dash_or_null_and_no_zero() -> None:
    idle = figures([reading("after.txt", 12.0)], {URL: reading("after.txt", 10.0)})
    worker = idle.workers[0]
    assert worker.step_ms is None and worker.bubble_share is None and worker.tokens_per_s is None
    assert json.loads(json.dumps(idle.to_json()))["workers"][0]["step_ms"] is None
    assert "–" in text_of(idle)


def test_a_worker_that_began_anew_counts_from_its_start() -> None:
    before = reading("before.txt", 10.0)
    other: Samples = {
        name: [({**labels, "epoch": "1"}, value) for labels, value in found]
        for name, found in before.samples.items()
    }
    worker = figures([reading("after.txt", 12.0)], {URL: replace(before, samples=other)}).workers[0]
    alone = figures([reading("after.txt", 12.0)], {}).workers[0]
    assert worker.step_ms == alone.step_ms
    fallen = figures([reading("before.txt", 12.0)], {URL: reading("after.txt", 10.0)})
    rate = fallen.gateways[0].requests_per_s
    assert rate is not None and rate > 0  # the gateway's counters fell: it is another process


def test_a_worker_that_two_gateways_see_is_one_worker() -> None:
    two = figures([reading("after.txt", 12.0), reading("after.txt", 12.0, "http://127.0.0.1:8090")], {})
    assert len(two.gateways) == 2 and len(two.workers) == 1


def test_quantiles_are_prometheus_own() -> None:
    buckets = {0.1: 10.0, 0.2: 30.0, float("inf"): 40.0}
    assert quantile_ms(buckets, 0.5) == pytest.approx(150.0)
    assert quantile_ms(buckets, 0.25) == pytest.approx(100.0)
    assert quantile_ms(buckets, 0.99) == pytest.approx(200.0)  # beyond the last bound nothing is known
    assert quantile_ms({0.1: 0.0, float("inf"): 0.0}, 0.5) is None and quantile_ms({}, 0.5) is None


def test_units_are_said() -> None:
    assert [milliseconds(value) for value in (None, 0.034, 12.3, 1234.0)] == ["–", "0.03ms", "12ms", "1.2s"]
    assert [number(value) for value in (None, 0.0, 3.25, 150.0, 12_345.0, 2.5e6)] == [
        "–",
        "0",
        "3.2",
        "150",
        "12k",
        "2.5M",
    ]
    assert [share(value) for value in (None, 0.0, 0.034, 0.5)] == ["–", "0%", "3.4%", "50%"]


def test_names_from_servers_move_no_cursor() -> None:
    shown = recorded()
    shown.models[0] = replace(shown.models[0], model="\x1b[2Jevil\n", about="\x07")
    assert "\x1b" not in text_of(shown) and "evil" in text_of(shown)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://h", "http://", "file:///etc/passwd"])
def test_addresses_are_checked(url: str) -> None:
    ended = CliRunner().invoke(app, ["top", url, "--once"])
    assert ended.exit_code == 2 and "http://127.0.0.1:8080" in ended.output
    assert check_url("http://h:1/metrics") == check_url("http://h:1/v1/") == "http://h:1"


class _Answers(BaseHTTPRequestHandler):
    """What a gateway says; `behaviour` of the server changes it."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        if server.behaviour == "key" and self.headers["Authorization"] != "Bearer sk-9":
            self.send_error(401)
            return
        if server.behaviour == "moved":
            self.send_response(302)
            self.send_header("Location", "http://192.0.2.1/metrics")
            self.end_headers()
            return
        body = b"<html>" if server.behaviour == "page" else (DATA / "after.txt").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    behaviour = ""
    daemon_threads = True
    allow_reuse_address = True


def started(port: int = 0) -> tuple[_Server, threading.Thread]:
    server = _Server(("127.0.0.1", port), _Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    return server, thread


@pytest.fixture
def server() -> Iterator[_Server]:
    made, thread = started()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("key", "--api-key-env"), ("page", "no metrics text"), ("moved", "answers 302")],
)
def test_why_there_are_no_figures_is_said(
    server: _Server, behaviour: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.behaviour = behaviour
    url = f"http://127.0.0.1:{server.server_port}"
    ended = CliRunner().invoke(app, ["top", url, "--once", "--json"])
    assert ended.exit_code == 1 and said in json.loads(ended.output)["gateways"][0]["state"]
    if behaviour == "key":
        monkeypatch.setenv("MY_KEY", "sk-9")
        ended = CliRunner().invoke(
            app, ["top", url, "--once", "--json", "--interval", "0", "--api-key-env", "MY_KEY"]
        )
        assert ended.exit_code == 0 and json.loads(ended.output)["gateways"][0]["state"] == "ready"
        assert "sk-9" not in ended.output


def test_a_server_goes_away_and_comes_back() -> None:
    server, thread = started()
    port = server.server_port
    watch = Watch([f"http://127.0.0.1:{port}"], None, 2.0)
    with ThreadPoolExecutor(1) as pool:
        assert watch.look(pool).gateways[0].is_there
        server.shutdown()
        server.server_close()
        thread.join()
        away = watch.look(pool)
        assert not away.gateways[0].is_there and not away.workers
        assert "does not answer" in text_of(away)
        server, thread = started(port)
        try:
            back = watch.look(pool)
            assert back.gateways[0].is_there and back.over_s is None  # nothing to compare with yet
            assert watch.look(pool).over_s is not None
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
