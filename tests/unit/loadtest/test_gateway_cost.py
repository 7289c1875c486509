"""The gateway's cost as a measurement: every transport once, briefly, and what is refused before anything starts."""

from __future__ import annotations

import resource

import pytest

from loadtest.bench.gateway_cost import _loads
from loadtest.gateway.measure import SPARE_FILES, check_files, measure, open_streams
from loadtest.gateway.stacks import Load

SAID: list[str] = []


@pytest.mark.parametrize(
    "load", [Load("sse", 3, 50.0, 2), Load("websocket", 3, 50.0), Load("http", 2, 500.0)]
)
def test_a_turn_gives_what_a_token_or_request_cost(load: Load) -> None:
    (row,) = measure([load], rounds=1, seconds=0.4, reference=None, say=SAID.append)
    told = row.to_json()
    unit = "us_per_request" if load.transport == "http" else "us_per_token"
    assert 1 < told[unit] < 100_000
    assert told[f"reference_{unit}"] is None
    if load.transport != "http":
        assert 0 < told["added_p50_ms"] <= told["added_p99_ms"] < 10_000


def test_a_limit_of_open_files_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    with pytest.raises(
        ValueError, match=rf"5000 streams need {5000 + SPARE_FILES} .* at most {512 - SPARE_FILES}"
    ):
        check_files(5000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    check_files(5000)
    assert raised == [(5000 + SPARE_FILES, resource.RLIM_INFINITY)]


def test_loads_are_bounded_and_named() -> None:
    assert {load.transport for load in _loads("sse, http", 4, 7)} == {"sse", "http"}
    assert max(load.streams for load in _loads("", 4, 0)) == 4
    with pytest.raises(ValueError, match="'grpc' is not a transport"):
        _loads("grpc", 4, 0)
    for count in (0, 10_001):
        with pytest.raises(ValueError, match="1 to 10000"):
            open_streams(count)
    with pytest.raises(ValueError, match="rounds are 1 to 50"):
        measure([Load("sse", 1, 1.0)], rounds=0, seconds=1, reference=None, say=SAID.append)
