"""The load test's client against a small server with faults: counts, times, errors, clean-up."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.client import Result, run
from loadtest.page import html_report
from loadtest.report import terminal_report, to_json
from loadtest.scenarios import Scenario, ScenarioError, Slo, plan
from tests.unit.loadtest.loadtest_fake_server import FakeServer, serving


@pytest.fixture(autouse=True)
async def _nothing_left_running() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    left = {task for task in asyncio.all_tasks() - before if "loadtest" in repr(task.get_coro())}
    assert not left


async def run_against(server: FakeServer, **values: Any) -> Result:
    async with serving(server):
        return await run(Scenario(url=server.url, **{"seconds": 0.4, "rate": 100.0, **values}))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["sse", "ws", "both"])
async def test_every_planned_request_is_sent_once_and_counted(transport: str) -> None:
    server = FakeServer()
    result = await run_against(server, transport=transport)
    planned = list(plan(result.scenario))
    assert result.all.sent == result.all.ok == len(planned) == sum(server.seen.values())
    assert result.all.tokens == sum(request.max_tokens for request in planned)
    assert result.all.chunks == result.all.tokens  # the fake sends a token a chunk
    assert len(result.all.ttft) == len(planned)
    assert len(result.all.gap) == sum(request.max_tokens - 1 for request in planned)
    assert not result.all.errors and result.stopped is None
    assert sum(second.ok for second in result.seconds) == len(planned)
    assert sum(second.arrived for second in result.seconds) == len(planned)
    if transport == "ws":
        assert server.sockets <= 4 and server.most_in_flight >= 1
    for surface, count in server.seen.items():
        assert result.groups[surface].sent == count


@pytest.mark.slow
async def test_delays_of_the_server_are_in_the_latencies() -> None:
    result = await run_against(FakeServer(first_s=0.05, gap_s=0.01), min_tokens=3, max_tokens=3, rate=50.0)
    assert result.all.ttft.min_ms >= 49.9
    assert result.all.gap.percentile_ms(50) >= 9.0
    assert result.all.total.min_ms >= 69.0


@pytest.mark.slow
async def test_queueing_shows_in_open_loop_because_latency_counts_from_the_schedule() -> None:
    """A server that takes one request at a time, 20 ms each, offered 200/s: the queue grows, and so must latency."""
    server = FakeServer(first_s=0.02, serial=True)
    result = await run_against(server, transport="sse", min_tokens=1, max_tokens=1, rate=200.0, seconds=0.25)
    least_ms = result.all.ok * 20 - 250 - 20
    assert result.all.ttft.max_ms >= least_ms > 100
    closed = await run_against(
        FakeServer(first_s=0.02, serial=True), transport="sse", in_flight=1, min_tokens=1, max_tokens=1,
        max_requests=8, seconds=5.0,
    )  # fmt: skip
    assert closed.all.ok == 8
    assert closed.all.ttft.percentile_ms(50) < result.all.ttft.max_ms  # the closed loop hides it


@pytest.mark.slow
async def test_closed_loop_holds_its_number_in_flight() -> None:
    server = FakeServer(first_s=0.01)
    result = await run_against(server, transport="both", in_flight=6, max_requests=60, seconds=10.0)
    assert result.all.sent == 60
    assert server.most_in_flight == 6
    assert any("Closed loop" in warning for warning in to_json(result)["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "fault", "code"),
    [
        ("sse", "busy", "queue_full"),
        ("ws", "busy", "queue_full"),
        ("sse", "plain500", "http_500"),
        ("sse", "midstream", "worker_lost"),
        ("ws", "midstream", "worker_lost"),
        ("sse", "truncate", "truncated"),
        ("sse", "garbage", "bad_event"),
        ("sse", "reset", "disconnected"),
        ("sse", "stray", "bad_response"),
    ],
)
async def test_faults_are_counted_by_code_and_the_rest_go_on(transport: str, fault: str, code: str) -> None:
    server = FakeServer(fault=lambda index: fault if index % 4 == 1 else None)
    result = await run_against(server, transport=transport, max_requests=24, rate=200.0)
    assert result.all.errors == {code: 6}
    assert result.all.ok == 18
    assert result.all.refused == (6 if fault == "busy" else 0)
    assert result.all.errors.total() + result.all.ok == result.all.sent == 24


@pytest.mark.slow
async def test_a_lost_socket_fails_its_lanes_and_is_opened_again() -> None:
    server = FakeServer(first_s=0.01, fault=lambda index: "reset" if index == 5 else None)
    result = await run_against(
        server, transport="ws", connections=1, max_requests=40, rate=200.0, seconds=2.0
    )
    assert set(result.all.errors) == {"disconnected"}
    assert result.all.ok >= 20 and result.all.sent == 40
    assert server.sockets == 2


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["sse", "ws"])
async def test_hanging_requests_time_out(transport: str) -> None:
    server = FakeServer(fault=lambda index: "hang" if index == 2 else None)
    result = await run_against(server, transport=transport, max_requests=8, request_timeout_s=0.2)
    assert result.all.errors == {"timeout": 1}
    assert result.all.ok == 7


@pytest.mark.slow
async def test_what_is_outstanding_after_the_grace_is_unfinished() -> None:
    server = FakeServer(fault=lambda index: "hang" if index == 2 else None)
    result = await run_against(server, transport="sse", max_requests=8, grace_s=1.0)
    assert result.all.errors == {"unfinished": 1}
    assert result.all.sent == 8


@pytest.mark.slow
async def test_a_dead_server_ends_the_run_early(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.client.LOST_AFTER_S", 0.05)
    monkeypatch.setattr("loadtest.client.LOST_AFTER", 16)
    result = await run(Scenario(url=f"http://127.0.0.1:{unused_tcp_port}", rate=200.0, seconds=60.0))
    assert result.stopped is not None and "does not answer" in result.stopped
    assert result.all.errors["connection_refused"] >= 16
    assert result.elapsed_s < 30


@pytest.mark.slow
async def test_a_server_that_dies_midway_is_a_result_not_an_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loadtest.client.LOST_AFTER_S", 0.05)
    server = FakeServer(first_s=0.005, gap_s=0.005)
    async with serving(server):
        stop = server.stop
        assert stop is not None
        asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(stop()))
        result = await run(Scenario(url=server.url, rate=300.0, seconds=30.0))
    assert result.all.ok > 0 and result.stopped is not None
    assert result.all.sent == result.all.ok + result.all.errors.total()


@pytest.mark.slow
async def test_stop_ends_it_and_keeps_what_was_measured() -> None:
    server, stop = FakeServer(), asyncio.Event()
    async with serving(server):

        async def stop_once_some_are_answered() -> None:
            while server.seen.total() < 20:  # noqa: ASYNC110 - the server counts and tells nobody
                await asyncio.sleep(0.01)
            stop.set()

        stopping = asyncio.create_task(stop_once_some_are_answered())
        result = await run(Scenario(url=server.url, rate=100.0, seconds=60.0), stop=stop)
        await stopping
    assert result.stopped == "interrupted" and result.all.ok > 0


@pytest.mark.slow
async def test_warm_up_waits_for_readiness_and_is_not_measured() -> None:
    server = FakeServer()
    result = await run_against(server, warmup_requests=8, max_requests=5, transport="sse")
    assert server.seen["readyz"] >= 2
    assert result.all.sent == 5
    assert server.seen["query"] + server.seen["chat"] == 13


async def test_a_server_that_is_not_ready_in_time_is_not_measured() -> None:
    """The run waits as long as it is told, then fails before it sends anything."""
    server = FakeServer(unready=1000)
    with pytest.raises(ScenarioError, match=r"not ready within 0\.05 s.*503.*--ready-s"):
        await run_against(server, warmup_requests=2, ready_s=0.05)
    assert set(server.seen) == {"readyz"}


def test_a_server_that_never_answers_is_a_failure_not_a_table(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    ended = CliRunner().invoke(app, ["short", "--url", url, "--warmup", "--ready-s", "0.2"])
    assert ended.exit_code == 2
    assert "was not ready" in ended.stderr and "req/s" not in ended.output


@pytest.mark.slow
async def test_the_key_is_sent() -> None:
    server = FakeServer()
    await run_against(server, transport="sse", api_key="sk-1", max_requests=2)
    assert all(headers["Authorization"] == "Bearer sk-1" for headers in server.headers)
    assert all(headers["X-Moondream-Auth"] == "sk-1" for headers in server.headers)


async def test_other_hosts_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(ScenarioError):
        await run(Scenario(url="http://192.0.2.1:8080"))


class _Wellformed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.slow
async def test_reports_agree_and_the_page_fetches_nothing() -> None:
    fault = lambda index: {3: "busy", 7: "midstream"}.get(index)  # noqa: E731
    result = await run_against(FakeServer(first_s=0.002, gap_s=0.002, fault=fault), slo=Slo(ttft_ms=200))
    data = json.loads(json.dumps(to_json(result)))
    assert data["schema"] == "degas.loadtest/1" and data["loop"] == "open"
    assert data["all"]["sent"] == result.all.sent
    assert sum(group["sent"] for group in data["surfaces"].values()) == result.all.sent
    assert data["all"]["errors"] == {"queue_full": 1, "worker_lost": 1}
    for width in (80, 150):
        console = Console(record=True, width=width, force_terminal=False, file=io.StringIO())
        console.print(terminal_report(result))
        text = console.export_text()
        assert "first token" in text and "queue_full" in text and "good/s" in text and "…" not in text
    page = html_report(result)
    parser = _Wellformed()
    parser.feed(page)
    assert sum(tag == "svg" for tag, _ in parser.tags) == 4
    assert not {tag for tag, _ in parser.tags} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"(src|href)\s*=|url\(|@import", page)
    assert "NaN" not in page and "inf" not in re.sub(r"[a-z]*info[a-z]*", "", page.split("<details>")[0])
    assert "prefers-color-scheme:dark" in page


async def test_a_result_without_requests_still_has_reports() -> None:
    result = await run_against(FakeServer(), rate=0.02, seconds=0.05)
    assert result.all.sent == 0
    assert html_report(result) and to_json(result)["all"]["sent"] == 0


def test_command_refuses_other_hosts_with_a_message() -> None:
    reply = CliRunner().invoke(app, ["short", "--url", "http://192.0.2.1"])
    assert reply.exit_code == 2
    assert "i-own-this-host" in reply.output
