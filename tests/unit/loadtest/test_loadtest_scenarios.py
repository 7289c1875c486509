"""What a load test asks of which target, its scenarios, several processes and the comparison of two runs."""

from __future__ import annotations

import io
import json
import pickle
import threading
from asyncio import new_event_loop, run_coroutine_threadsafe
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.bodies import build_body
from loadtest.calls import LEFT
from loadtest.cli import app
from loadtest.client import Result, run
from loadtest.compared import compared_page, compared_table, read_report
from loadtest.histogram import Histogram
from loadtest.page import html_report
from loadtest.pictures import draw_picture
from loadtest.questions import SCHEMA, long_prompt_tokens, make_ask
from loadtest.report import terminal_report, to_json
from loadtest.scenarios import Planned, Scenario, ScenarioError, Target, plan
from loadtest.shards import merge, on_loop
from loadtest.target import fit, read_meter
from tests.unit.loadtest.loadtest_fake_server import FakeServer, serving

TEXT_ONLY = Target(takes_images=False, surfaces=("chat", "responses"))
DEGAS_TEXT = {"id": "t", "family": "llama", "capabilities": ["chat", "completions"], "takes_images": False,
              "context_tokens": 800}  # fmt: skip
DEGAS_EYES = {"id": "v", "family": "moondream", "capabilities": ["chat", "query"], "takes_images": True}


async def fitted(server: FakeServer, **values: Any) -> Scenario:
    async with serving(server):
        return await fit(Scenario(url=server.url, **values))


async def test_a_text_model_is_asked_texts_over_what_it_answers() -> None:
    scenario = await fitted(FakeServer(models=[DEGAS_TEXT]))
    assert scenario.model == "t" and not scenario.target.takes_images
    assert scenario.surfaces == ("responses", "chat")
    asked = [make_ask(planned, scenario, []) for planned in plan(scenario)]
    assert asked and all(ask.picture is None and ask.messages[0][1] for ask in asked)


async def test_pictures_are_tried_before_they_are_asked_about() -> None:
    assert (await fitted(FakeServer(models=[DEGAS_EYES]))).target.takes_images
    assert not (await fitted(FakeServer(models=[DEGAS_EYES], takes_pictures=False))).target.takes_images


async def test_another_server_gets_texts_over_sse_and_the_older_limit() -> None:
    server = FakeServer(models=[{"id": "m", "max_model_len": 4096}])
    scenario = await fitted(server)
    assert not scenario.target.is_degas and scenario.target.context_tokens == 4096
    assert scenario.surfaces == ("chat",) and not scenario.target.takes_images
    async with serving(server):
        result = await run(replace(scenario, url=server.url + "/v1", rate=100.0, seconds=0.1))
    assert result.all.ok == result.all.sent > 0
    assert all("max_tokens" in body and "max_completion_tokens" not in body for body in server.bodies)
    with pytest.raises(ScenarioError, match="--transport sse"):
        await fitted(server, transport="ws")


@pytest.mark.parametrize(
    ("server", "values", "said"),
    [
        (FakeServer(models=[DEGAS_TEXT]), {"model": "other"}, "there are: t"),
        (FakeServer(models=[]), {}, "--warmup"),
        (FakeServer(models=[{**DEGAS_TEXT, "capabilities": ["completions"]}]), {"kind": "chat"}, "chat template"),
        (FakeServer(models=[DEGAS_TEXT]), {"kind": "long", "prompt_tokens": 790}, "safe value is"),
    ],
)  # fmt: skip
async def test_what_cannot_be_asked_is_said_before_anything_is_sent(
    server: FakeServer, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ScenarioError, match=said):
        await fitted(server, **values)


async def test_a_missing_key_and_a_refused_trial_are_said() -> None:
    with pytest.raises(ScenarioError, match="--api-key-env"):
        await fitted(FakeServer(models=[DEGAS_TEXT], models_status=401))
    with pytest.raises(ScenarioError, match="trial request was refused: unsupported"):
        await fitted(FakeServer(models=[DEGAS_TEXT], takes_trials=False), kind="long")


async def test_long_prompts_fit_the_context_by_measured_words() -> None:
    scenario = await fitted(FakeServer(models=[DEGAS_TEXT]), kind="long")
    assert scenario.target.tokens_per_word == pytest.approx(2.0)  # as the fake counts
    assert long_prompt_tokens(scenario) == 480
    texts = [make_ask(planned, scenario, []).messages[0][1] for planned in list(plan(scenario))[:8]]
    assert all(230 < len(text.split()) < 270 for text in texts)
    assert len({text[:20] for text in texts}) == len(texts)


def test_the_first_error_of_each_code_is_in_every_report() -> None:
    result = on_loop(_failing_run())
    assert to_json(result)["all"]["first_errors"] == {
        "queue_full": "full",
        "worker_lost": "its worker was lost",
    }
    console = Console(record=True, width=80, force_terminal=False, file=io.StringIO())
    console.print(terminal_report(result))
    assert "its worker was lost" in console.export_text()
    assert "its worker was lost" in html_report(result).split("<details>")[0]


async def _failing_run() -> Result:
    server = FakeServer(fault=lambda index: {3: "busy", 7: "midstream", 9: "midstream"}.get(index))
    async with serving(server):
        scenario = Scenario(
            url=server.url, rate=200.0, seconds=0.2, transport="sse", target=TEXT_ONLY, max_requests=20
        )
        return await run(scenario)


async def asked_of(server: FakeServer, **values: Any) -> Result:
    async with serving(server):
        return await run(
            Scenario(url=server.url, **{"rate": 100.0, "seconds": 0.2, "target": TEXT_ONLY, **values})
        )


@pytest.mark.slow
async def test_a_conversation_sends_its_history_again() -> None:
    server = FakeServer()
    result = await asked_of(server, kind="chat", transport="both", turns=3, think_s=0.0, max_requests=4)
    assert result.all.ok == 12
    turns = [body.get("messages") or body["input"] for body in server.bodies]
    assert sorted(map(len, turns)) == [1] * 4 + [3] * 4 + [5] * 4
    last = next(turn for turn in turns if len(turn) == 5)
    assert [one["role"] for one in last] == ["user", "assistant", "user", "assistant", "user"]
    assert "w0 w1" in json.dumps(last[1])


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["sse", "ws"])
async def test_clients_that_leave_are_no_errors(transport: str) -> None:
    server = FakeServer(gap_s=0.01)
    result = await asked_of(
        server, kind="cancels", transport=transport, min_tokens=16, max_tokens=16, max_requests=10
    )
    assert result.all.left == 10 and not result.all.errors
    assert result.all.good_share == 0.0 and len(result.all.ttft) == 10
    assert {point.code for point in result.points} == {LEFT}


@pytest.mark.slow
async def test_slow_readers_are_counted_apart() -> None:
    server = FakeServer()
    result = await asked_of(
        server, kind="slow", slow_share=0.5, pause_s=0.05, max_requests=12, transport="sse"
    )
    slow, rest = result.kinds["slow"], result.kinds["short"]
    assert slow.ok > 0 and rest.ok > 0 and slow.ok + rest.ok == 12
    assert result.all.sent == rest.sent
    assert "slow" in to_json(result)["kinds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "code"),
    [('{"kind":"thing","count":1,"is_large":true}', None), ("{}", "json_invalid"), ("words", "json_invalid")],
)
async def test_a_structured_answer_is_checked(answer: str, code: str | None) -> None:
    server = FakeServer(answer=answer)
    result = await asked_of(server, kind="structured", transport="sse", max_requests=3)
    assert result.all.errors == ({code: 3} if code else {})
    assert result.all.ok == (0 if code else 3)
    if code:
        assert answer in result.all.first_errors[code]
    assert all(body["response_format"]["json_schema"]["schema"] == SCHEMA for body in server.bodies)


def test_bursts_arrive_together_and_in_every_process() -> None:
    whole = Scenario(kind="bursts", burst=8, rate=200.0, seconds=10.0, seed=3)
    times = [planned.due_s for planned in plan(whole)]
    assert len(times) == 8 * len(set(times)) and 1200 < len(times) < 2800
    parts = [list(plan(part)) for part in replace(whole, processes=2).shares()]
    assert {planned.due_s for planned in parts[0]} == {planned.due_s for planned in parts[1]}


def test_mixed_has_every_kind_and_equal_seeds_ask_equal_things() -> None:
    scenario = Scenario(kind="mixed", rate=200.0, seconds=5.0, target=TEXT_ONLY)
    planned = list(plan(scenario))
    assert {one.kind for one in planned} == {"short", "chat", "long", "structured", "cancels", "slow"}
    assert planned == list(plan(scenario))
    assert all(one.surface in ("chat", "responses") for one in planned)


def test_every_interface_says_what_is_asked() -> None:
    picture = draw_picture(1)
    scenario = Scenario(kind="structured")
    for surface in ("chat", "responses", "completions"):
        planned = Planned(0, 0.0, surface, 0, 0, 5, kind="structured")
        body = json.loads(build_body(planned, make_ask(planned, scenario, [picture]), "m"))
        assert json.loads(json.dumps(SCHEMA)) in (
            body.get("response_format", {}).get("json_schema", {}).get("schema"),
            body.get("text", {}).get("format", {}).get("schema"),
        )


def test_parts_offer_the_whole_and_merge_to_it() -> None:
    scenario = Scenario(rate=100.0, max_requests=1001, processes=3, target=TEXT_ONLY)
    shares = scenario.shares()
    assert sum(share.rate for share in shares) == pytest.approx(100.0)
    assert sum(share.max_requests for share in shares) == 1001
    assert len({tuple(plan(share)) for share in shares}) == 3
    parts = [on_loop(_failing_run()) for _ in range(2)]
    whole = merge(scenario, [pickle.loads(pickle.dumps(part)) for part in parts])  # noqa: S301 - made here
    assert whole.all.sent == 40 and whole.all.errors == {"queue_full": 2, "worker_lost": 4}
    assert len(whole.all.ttft) == sum(len(part.all.ttft) for part in parts)
    both = Histogram()
    for part in parts:
        both.add(part.all.total)
    for percentile in (50.0, 90.0, 99.0):
        assert whole.all.total.percentile_ms(percentile) == both.percentile_ms(percentile)
    assert sum(second.ok for second in whole.seconds) == whole.all.ok
    assert html_report(whole) and to_json(whole)


async def test_meters_are_read_where_there_are_any() -> None:
    metrics = 'degas_worker_price_per_hour{worker="0"} 1.5\ndegas_worker_price_per_hour{worker="1"} 2.0\n# x\ndegas_requests_in_flight 3.0\n'
    for text, price, in_flight in ((metrics, 3.5, 3.0), ("", None, None)):
        server = FakeServer(metrics=text)
        async with serving(server):
            import aiohttp

            async with aiohttp.ClientSession() as session:
                meter = await read_meter(Scenario(url=server.url), session)
        assert (meter.price_per_hour, meter.in_flight, meter.joules) == (price, in_flight, None)


def test_two_runs_are_compared(tmp_path: Path) -> None:
    result = on_loop(_failing_run())
    for name, cost in (("a.json", None), ("b.json", 0.5)):
        result.cost = cost
        (tmp_path / name).write_text(json.dumps(to_json(result)))
    runs = read_report(tmp_path / "a.json"), read_report(tmp_path / "b.json")
    console = Console(record=True, width=80, force_terminal=False, file=io.StringIO())
    console.print(compared_table(*runs))
    text = console.export_text()
    assert "worker_lost" in text and "first token p99" in text and "tokens per currency unit" in text
    page = compared_page(*runs)
    assert page.count("<svg") >= 3 and "src=" not in page and "href=" not in page
    for bad in (
        "nonsense",
        "{}",
        '{"schema": "degas.loadtest/1", "all": {"ttft_ms": {"hdr": "xx", "mean": 1, "count": 1}}}',
    ):
        (tmp_path / "c.json").write_text(bad)
        ended = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "c.json")])
        assert ended.exit_code == 2 and "c.json" in ended.stderr.replace("\n", "")


@pytest.fixture
def served() -> Iterator[FakeServer]:
    """A fake server on a thread's loop, for commands that run loops of their own."""
    loop = new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = FakeServer(models=[DEGAS_TEXT])
    context = serving(server)
    run_coroutine_threadsafe(context.__aenter__(), loop).result()
    yield server
    run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.slow
def test_the_command_with_two_processes_and_a_key_by_variable(
    served: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-7")
    path = tmp_path / "r.json"
    asked = [
        "short",
        "--url",
        served.url,
        "--rate",
        "60",
        "--seconds",
        "0.5",
        "--processes",
        "2",
        "--json",
        str(path),
    ]
    ended = CliRunner().invoke(app, [*asked, "--api-key-env", "MY_KEY"])
    assert ended.exit_code == 0, ended.output
    data = json.loads(path.read_text())
    assert data["all"]["ok"] == data["all"]["sent"] == served.seen["chat"] + served.seen["responses"] > 0
    assert data["scenario"]["processes"] == 2 and "sk-7" not in path.read_text()
    assert all(headers["Authorization"] == "Bearer sk-7" for headers in served.headers)
    missing = CliRunner().invoke(app, [*asked, "--api-key-env", "NO_SUCH_KEY"])
    assert missing.exit_code == 2 and "NO_SUCH_KEY" in missing.stderr
