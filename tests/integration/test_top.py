"""`degas top` and the load test against a real gateway and a real worker on the simulated device, with a price."""

from __future__ import annotations

import asyncio
import io
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from degas.top.command import Watch
from degas.top.view import render
from loadtest.report import to_json
from loadtest.scenarios import Scenario
from loadtest.shards import run_metered
from loadtest.target import fit
from tests.integration.stack import SIM, stack, until

KEYS = "key-of-the-first,key-of-the-second"


@pytest.mark.slow
def test_what_a_real_server_does_is_shown_and_so_is_its_cost() -> None:
    with (
        stack([*SIM, "--price-per-hour", "3.6"], api_keys=KEYS, public="readiness") as running,
        ThreadPoolExecutor(1) as pool,
    ):
        watch = Watch([running.url], "key-of-the-first", 5.0)
        before = watch.look(pool)
        assert before.gateways[0].state == "ready" and before.workers[0].model == "sim"
        assert (
            before.models[0].joules_per_token is None
        )  # the simulated device uses no energy that could be read
        asked = Scenario(
            url=running.url,
            api_key="key-of-the-second",
            kind="short",
            rate=40.0,  # so that a heartbeat with the price comes meanwhile
            seconds=2.0,
            max_requests=60,
        )
        result = run_metered(asyncio.run(fit(asked)))
        assert result.all.ok == 60, result.all.first_errors
        found = watch.look(pool)
        gateway = found.gateways[0]
        assert gateway.requests_per_s is not None and gateway.requests_per_s > 0 and gateway.streams == 0
        assert gateway.ttft_p50_ms is not None and gateway.gap_p50_ms is not None
        told = to_json(result)
        assert told["costs"]["tokens_per_currency"] == pytest.approx(
            told["all"]["tokens"] / (3.6 * result.elapsed_s / 3600), rel=0.01
        )
        assert told["still_in_flight"] == 0 and "joules" not in told["costs"]
        until(
            lambda: watch.look(pool).models[0].tokens_per_currency
        )  # it comes with the worker's next heartbeat
        last = watch.look(pool)
        assert last.models[0].tokens_per_currency is not None
        assert [one["tenant"] for one in last.tenants] == ["key-2"]
        assert last.tenants[0]["tokens"] >= told["all"]["tokens"]
        assert running.gateway is not None
        running.gateway.send_signal(signal.SIGKILL)
        running.gateway.wait()
        away = watch.look(pool)
        assert not away.gateways[0].is_there
        console = Console(record=True, width=80, force_terminal=False, file=io.StringIO())
        console.print(render(away, "12:00:00"))
        assert "does not answer" in console.export_text()
