"""Degas beside transformers end to end: engines and servers in processes of their own, a tiny checkpoint."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from loadtest.peers import engine_bench, serve_bench
from loadtest.peers.catalog import Pythons, engine_peers
from loadtest.peers.servers import known_servers

pytestmark = pytest.mark.slow


def test_engines_give_the_same_tokens() -> None:
    peers, left_out = engine_peers(Pythons())
    workload = engine_bench.Workload("tiny", (2,), prompt_tokens=8, new_tokens=4, rounds=1)
    done = engine_bench.measure(workload, peers, left_out)
    lines = {line["engine"]: line for line in done.figures()}
    assert set(lines) == {"degas", "transformers", "transformers (cb)"}, done.left_out
    assert len(done.left_out) == 2  # vLLM and llama.cpp, for which no interpreter was given
    for line in lines.values():
        assert line["ratio"] > 0 and line["same_tokens"] >= 0.5  # bf16 may part at a near tie


def test_requests_are_answered_over_http() -> None:
    can_serve = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))
    servers, left_out = known_servers(Pythons(transformers=sys.executable if can_serve else ""))
    load = serve_bench.Load("tiny", (2,), prompt_tokens=8, new_tokens=4, seconds=0.5, rounds=1)
    done = serve_bench.measure(load, servers, left_out)
    lines = done.figures()
    assert [line["server"] for line in lines] == [server.name for server in servers], done.left_out
    assert all(line["answered"] >= 2 and not line["failures"] for line in lines), lines
