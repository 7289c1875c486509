"""Reading streamed completions, and a server's turn against a small server with faults."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from rich.console import Console

from loadtest.calls import Call, Tally
from loadtest.peers.completions import Reading
from loadtest.peers.serve_bench import Comparison, Load, Turn, play_round, run_turn, turn_from
from loadtest.peers.servers import TRANSFORMERS_SERVE, RunningServer
from loadtest.scenarios import Slo


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str, reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": piece, "finish_reason": reason}])


USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})


def read(*chunks: bytes, max_tokens: int = 2) -> Call:
    """Chunk i arrives at second i + 1."""
    call = Call("completions", 0.0)
    reading = Reading(call)
    for index, chunk in enumerate(chunks):
        reading.feed(chunk, float(index + 1))
    reading.close(float(len(chunks) + 1), max_tokens)
    return call


def test_the_first_token_is_the_first_text_however_the_bytes_are_cut() -> None:
    whole = b": ping\n\n" + text("") + text("A") + text("B", "length") + USAGE + b"data: [DONE]\n\n"
    call = read(text(""), text("A"), text("B", "length"), USAGE, b"data: [DONE]\n\n")
    assert (call.code, call.first_s, call.tokens, call.num_chunks) == ("ok", 2.0, 2, 2)
    for cut in range(len(whole)):
        call = read(whole[:cut], whole[cut:])
        assert call.code == "ok" and call.num_chunks == 2 and call.tokens == 2
    assert read(whole.replace(b"\n", b"\r\n")).code == "ok"


def test_a_stream_may_end_without_the_mark_but_not_without_a_reason() -> None:
    assert read(text("A"), text("B", "length")).code == "ok"
    assert read(text("A"), text("B")).code == "truncated"


def test_answers_that_did_less_work_are_failures() -> None:
    assert read(text("A", "stop"), USAGE, max_tokens=16).code == "wrong_length"
    assert read(text("", "stop")).code == "no_text"
    assert read(text("A"), event(error="the engine died")).code == "error_event"
    assert read(text("A"), event(error={"message": "m"}), text("B", "stop")).code == "error_event"


class FakeServer:
    """Answers `/v1/completions` at once with as many tokens as asked, or with a fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.fault == "refuse":
            return web.json_response({"error": {"message": "full", "code": "queue_full"}}, status=429)
        if self.fault == "hang":
            await asyncio.sleep(600)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for index in range(body["max_tokens"]):
            await asyncio.sleep(0)
            await response.write(text("A", "length" if index == body["max_tokens"] - 1 else None))
        await response.write(b"data: [DONE]\n\n")
        self.in_flight -= 1
        return response


class FakeRunning:
    """Stands in for a `RunningServer`."""

    def __init__(self, url: str, *, can_pause: bool = True) -> None:
        self.url, self.model = url, "bench"
        self.server = SimpleNamespace(name="fake", can_pause=can_pause)
        self.stopped = False
        self.signals: list[int] = []

    def cpu_s(self) -> float:
        return 0.0

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def stop(self) -> None:
        self.stopped = True


@asynccontextmanager
async def up(server: FakeServer) -> AsyncIterator[FakeRunning]:
    app = web.Application()
    app.router.add_post("/v1/completions", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)  # an answer that hangs is not waited for
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield FakeRunning(f"http://{host}:{port}")
    finally:
        await runner.cleanup()


LOAD = Load(new_tokens=3, seconds=0.1, rounds=1)


async def test_a_turn_keeps_so_many_in_flight_and_counts_them() -> None:
    server = FakeServer()
    async with up(server) as running:
        turn = await run_turn(cast(RunningServer, running), LOAD, 4, ["abc", "def"], 0.05, 20.0)
    assert turn.answered == len(server.bodies) >= 4 and not turn.failures
    assert 1 <= server.most_in_flight <= 4
    assert {body["prompt"] for body in server.bodies} == {"abc", "def"}
    assert all(body["max_tokens"] == 3 and body["temperature"] == 0 for body in server.bodies)
    assert turn.first_p50_ms is not None and turn.requests_per_s > 0 and turn.per_cpu_s is None


async def test_each_lane_sends_at_least_one_request_whatever_the_time() -> None:
    server = FakeServer()
    async with up(server) as running:
        turn = await run_turn(cast(RunningServer, running), LOAD, 3, ["abc"], 0.0, 20.0)
    assert turn.answered == len(server.bodies) == 3


async def test_refusals_are_counted_and_not_averaged() -> None:
    async with up(FakeServer("refuse")) as running:
        turn = await run_turn(cast(RunningServer, running), LOAD, 2, ["abc"], 0.03, 20.0)
    assert turn.answered == 0 and set(turn.failures) == {"queue_full"}
    assert turn.first_p50_ms is None and turn.requests_per_s == 0.0


@pytest.mark.slow
async def test_what_is_unfinished_at_the_end_of_a_turn_is_counted_with_its_wait() -> None:
    async with up(FakeServer("hang")) as running:
        turn = await run_turn(cast(RunningServer, running), LOAD, 3, ["abc"], 0.0, 1.0)
    assert turn.answered == 0 and turn.failures == {"unfinished": 3} and turn.requests_per_s == 0.0
    assert turn.first_p50_ms is not None and turn.first_p50_ms >= 100


def test_a_server_that_answers_nothing_is_stopped_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = FakeRunning("http://127.0.0.1:9"), FakeRunning("http://127.0.0.1:9", can_pause=False)

    async def fake_turn(running: Any, *_: object) -> Turn:
        answered = 0 if running is dead else 5
        return Turn(answered, {} if answered else {"timeout": 4}, 1.0, 1.0, 1.0, 1.0, None)

    monkeypatch.setattr("loadtest.peers.serve_bench.run_turn", fake_turn)
    comparison = Comparison(LOAD)
    servers = cast(dict[str, RunningServer], {"dead": dead, "alive": alive})
    done = play_round(comparison, servers, ["dead", "alive"], 4, ["a"], lambda line: None)
    assert sorted(done) == ["alive", "dead"] and list(servers) == ["alive"]
    assert dead.stopped and not alive.stopped and len(alive.signals) == 1  # it may not be paused
    assert comparison.left_out == ["dead: stopped at 4 in flight: it answered nothing ({'timeout': 4})"]
    assert list(play_round(comparison, servers, ["dead", "alive"], 4, ["a"], lambda line: None)) == ["alive"]


def test_figures_are_ratios_of_the_same_round() -> None:
    done = Comparison(LOAD, servers=["degas", TRANSFORMERS_SERVE])
    slow, fast = Turn(10, {}, 5.0, 200.0, 300.0, 400.0, 20.0), Turn(90, {}, 40.0, 20.0, 30.0, 40.0, 5.0)
    done.rounds[16] = [{"degas": fast, TRANSFORMERS_SERVE: slow}] * 2
    ours, theirs = done.figures()
    assert (ours["ratio"], ours["cpu_ratio"], ours["first_p50_ratio"]) == (8.0, 4.0, 0.1)
    assert theirs["ratio"] == 1.0 and ours["answered"] == 180
    assert json.loads(json.dumps(done.to_json()))["figures"] == done.figures()
    output = io.StringIO()
    Console(file=output, width=80).print(done.table())
    assert "8.00×" in output.getvalue() and "…" not in output.getvalue()


def test_a_turn_is_added_up_from_its_calls() -> None:
    tally = Tally(Slo())
    for index, code in enumerate(("ok", "ok", "timeout")):
        call = Call("completions", 0.0)
        call.on_text(0.1 * (index + 1))
        call.on_end(1.0, code)
        tally.on_call(call)
    turn = turn_from(tally, 2.0, 0.5)
    assert (turn.answered, turn.failures, turn.requests_per_s, turn.cpu_ms) == (2, {"timeout": 1}, 1.0, 250.0)
    assert turn.first_p99_ms == pytest.approx(200.0, rel=1e-2) and turn.per_cpu_s == 4.0


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"shape": "7b"}, "--shape"),
        ({"in_flight": ()}, "--in-flight"),
        ({"in_flight": (1, 100_000)}, "--in-flight"),
        ({"seconds": 0.0}, "--seconds"),
        ({"new_tokens": 0}, "--new-tokens"),
        ({"rounds": 0}, "--rounds"),
    ],
)
def test_a_load_out_of_bounds_is_refused_by_name(changed: dict[str, object], option: str) -> None:
    with pytest.raises(ValueError, match=option):
        Load(**changed).check()  # type: ignore[arg-type]
