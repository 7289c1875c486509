"""Timing accounts, histograms, plans and bounds of the load test: pure, no sockets."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.bodies import build_body
from loadtest.calls import Call, Tally
from loadtest.histogram import Histogram
from loadtest.pictures import draw_picture, draw_pictures
from loadtest.questions import make_ask
from loadtest.scenarios import Scenario, ScenarioError, Slo, check_target, plan
from loadtest.surfaces import (
    read_chat_event,
    read_error_body,
    read_query_event,
    read_response_event,
)


def exact_percentile(values: list[float], percentile: float) -> float:
    """The value at the nearest rank, halves up: HDR's own rule, on the unrounded values."""
    ordered = sorted(values)
    return ordered[max(0, int(len(ordered) * percentile / 100 + 0.5) - 1)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-6, 500.0), min_size=1, max_size=400), st.sampled_from([50.0, 90.0, 99.0, 100.0]))
def test_hdr_percentiles_agree_with_exact_ones(values: list[float], percentile: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    exact_ms = exact_percentile(values, percentile) * 1e3
    # three significant digits, a microsecond's rounding
    assert histogram.percentile_ms(percentile) == pytest.approx(exact_ms, rel=2e-3, abs=2e-3)
    assert len(histogram) == len(values)
    assert sum(bucket.count for bucket in histogram.buckets()) == len(values)


def test_histograms_merge_exactly_and_survive_their_encoding() -> None:
    from hdrh.histogram import HdrHistogram

    rng = random.Random(3)
    values = [rng.lognormvariate(-4, 1) for _ in range(3000)]
    whole, left, right = Histogram(), Histogram(), Histogram()
    for index, value in enumerate(values):
        whole.record(value)
        (left if index % 2 else right).record(value)
    left.add(right)
    assert {**left.summary(), "hdr": ""} == {**whole.summary(), "hdr": ""}
    decoded = HdrHistogram.decode(whole.summary()["hdr"])
    assert decoded.get_value_at_percentile(99) / 1e3 == whole.percentile_ms(99)


def test_empty_histogram_has_a_summary() -> None:
    histogram = Histogram()
    assert histogram.summary()["count"] == 0
    assert histogram.curve() == [] and histogram.buckets() == []


def test_buckets_hold_their_values_and_touch() -> None:
    histogram = Histogram()
    for value in (0.001, 0.001, 0.01, 0.5):
        histogram.record(value)
    buckets = histogram.buckets()
    assert [bucket.count for bucket in buckets if bucket.count] == [2, 1, 1]
    assert all(left.high_ms == right.low_ms for left, right in pairwise(buckets))
    assert buckets[0].low_ms <= 1.0 < buckets[0].high_ms


def test_latency_counts_from_the_schedule_not_from_the_send() -> None:
    call = Call("query", due_s=10.0)
    call.sent_s = 10.4  # the client, or a full connection pool, was late
    call.on_text(10.5)
    call.on_text(10.52)
    call.on_text(10.55)
    call.on_end(10.56)
    tally = Tally(Slo(ttft_ms=0, total_ms=0))
    tally.on_call(call)
    assert tally.ttft.max_ms == pytest.approx(500, rel=2e-3)
    assert tally.total.max_ms == pytest.approx(560, rel=2e-3)
    assert len(tally.gap) == 2
    assert tally.gap.max_ms == pytest.approx(30, rel=2e-3)
    assert (tally.ok, tally.good, tally.tokens, tally.chunks) == (1, 1, 3, 3)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_ms=99, total_ms=0), False),
        (Slo(ttft_ms=101, total_ms=0), True),
        (Slo(ttft_ms=0, total_ms=399), False),
        (Slo(ttft_ms=0, total_ms=401), True),
        (Slo(ttft_ms=0, gap_ms=199, total_ms=0), False),
        (Slo(ttft_ms=0, gap_ms=201, total_ms=0), True),
    ],
)
def test_goodput_looks_at_each_limit(slo: Slo, good: bool) -> None:
    call = Call("chat", 0.0)
    call.on_text(0.1)
    call.on_text(0.3)
    call.on_end(0.4)
    assert call.is_good(slo) is good


def test_a_call_ends_once_and_errors_are_not_latencies() -> None:
    refused = Call("chat", 1.0)
    refused.status = 429
    refused.on_end(1.01, "queue_full")
    refused.on_end(2.0, "disconnected")
    broken = Call("chat", 1.0)
    broken.on_text(1.5)
    broken.on_end(1.6, "worker_lost")
    tally = Tally(Slo())
    tally.on_call(refused)
    tally.on_call(broken)
    assert tally.errors == {"queue_full": 1, "worker_lost": 1}
    assert (tally.sent, tally.ok, tally.refused, len(tally.ttft), len(tally.gap)) == (2, 0, 1, 0, 0)
    assert len(tally.refusal) == 1
    assert tally.summary(10.0)["errors"] == {"queue_full": 1, "worker_lost": 1}


def test_plans_are_seeded_poisson_and_bounded() -> None:
    scenario = Scenario(rate=200.0, seconds=20.0, seed=7, transport="both")
    first, again = list(plan(scenario)), list(plan(scenario))
    assert first == again
    assert first != list(plan(Scenario(rate=200.0, seconds=20.0, seed=8, transport="both")))
    assert abs(len(first) - 4000) < 5 * 4000**0.5
    gaps = [b.due_s - a.due_s for a, b in pairwise(first)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert 0.8 < variance**0.5 / mean < 1.2  # an exponential's deviation equals its mean
    assert all(3 <= planned.max_tokens <= 16 and planned.due_s < 20.0 for planned in first)
    assert {planned.surface for planned in first} == {"query", "chat", "responses"}
    assert sum(planned.surface == "responses" for planned in first) == pytest.approx(len(first) / 2, abs=1)
    assert len(list(plan(Scenario(rate=200.0, seconds=20.0, max_requests=13)))) == 13
    closed = list(plan(Scenario(in_flight=4, max_requests=50)))
    assert len(closed) == 50 and all(planned.due_s == 0.0 for planned in closed)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8080", "http://127.9.9.9", "http://[::1]:80", "https://localhost:1"]
)
def test_loopback_is_allowed(url: str) -> None:
    check_target(url, i_own_this_host=False)


@pytest.mark.parametrize(
    "url", ["http://example.org", "http://10.0.0.1:8080", "http://0.0.0.0", "http://localhost.example.org"]
)
def test_other_hosts_need_their_owners_word(url: str) -> None:
    with pytest.raises(ScenarioError, match="i-own-this-host"):
        check_target(url, i_own_this_host=False)
    check_target(url, i_own_this_host=True)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://127.0.0.1", "http://", "file:///etc"])
def test_nonsense_addresses_are_refused_even_then(url: str) -> None:
    with pytest.raises(ScenarioError):
        check_target(url, i_own_this_host=True)


@pytest.mark.parametrize(
    "values",
    [
        {"rate": 0.0}, {"rate": 1e9}, {"rate": float("nan")}, {"seconds": 0.0}, {"seconds": 1e6},
        {"max_requests": 0}, {"max_requests": 10**9}, {"in_flight": -1}, {"in_flight": 10**6},
        {"transport": "carrier-pigeon"}, {"pictures": 0}, {"min_tokens": 9, "max_tokens": 3}, {"connections": 0},
    ],
)  # fmt: skip
def test_unbounded_scenarios_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ScenarioError):
        Scenario(**values).check()  # type: ignore[arg-type]


def test_the_key_stays_out_of_reports() -> None:
    scenario = Scenario(api_key="sk-secret")
    assert "sk-secret" not in repr(scenario)
    assert "sk-secret" not in str(scenario.public())


def test_pictures_are_seeded_and_differ() -> None:
    assert draw_picture(5) == draw_picture(5)
    drawn = draw_pictures(12, seed=1)
    assert len({picture.data_url for picture in drawn}) == 12
    assert all(picture.data_url.startswith("data:image/png;base64,") for picture in drawn)
    assert all(len(picture.questions) == 5 and picture.num_bytes < 4096 for picture in drawn)


def test_stream_events_are_read() -> None:
    assert read_query_event(b'{"chunk":"a","completed":false,"token_index":0}').text
    last = read_query_event(b'{"chunk":"","completed":true,"token_index":6,"metrics":{"output_tokens":5}}')
    assert (last.done, last.text, last.tokens) == (True, "", 5)
    assert read_query_event(b'{"error":{"code":"worker_lost","message":"m"}}').error == "worker_lost"
    assert not read_chat_event(b'{"choices":[{"delta":{"role":"assistant","content":""}}]}').text
    assert read_chat_event(b'{"choices":[{"delta":{"content":"x"}}],"usage":null}').text
    assert read_chat_event(b'{"choices":[],"usage":{"completion_tokens":4}}').tokens == 4
    assert read_chat_event(b"[DONE]").done
    delta = read_response_event('{"type":"response.output_text.delta","stream_id":"r1","delta":"x"}')
    assert (delta.text, delta.lane) == ("x", "r1")
    done = read_response_event(
        b'{"type":"response.completed","stream_id":"r1","response":{"usage":{"output_tokens":3}}}'
    )
    assert (done.done, done.tokens, done.error) == (True, 3, None)
    cut = read_response_event(
        '{"type":"response.incomplete","response":{"incomplete_details":{"reason":"max_output_tokens"}}}'
    )
    assert cut.done and cut.error is None
    cancelled = read_response_event(
        '{"type":"response.incomplete","response":{"incomplete_details":{"reason":"cancelled"}}}'
    )
    assert cancelled.error == "cancelled" and not cancelled.done
    assert (
        read_response_event('{"type":"error","stream_id":"r2","error":{"code":"queue_full"}}').error
        == "queue_full"
    )
    assert read_response_event('{"type":"error","code":"queue_full","message":"m"}').error == "queue_full"
    assert read_error_body(b'{"error":{"code":"queue_full"}}', 429) == "queue_full"
    assert read_error_body(b"<html>", 502) == "http_502"


def test_bodies_match_their_interfaces() -> None:
    import json

    picture = draw_picture(1)
    scenario = Scenario(rate=100, seconds=1, transport="both")
    for planned in list(plan(scenario))[:4]:
        ask = make_ask(planned, scenario, [picture] * scenario.pictures)
        body = json.loads(build_body(planned, ask, "pocket"))
        assert body["model"] == "pocket"
        if planned.surface == "query":
            assert body["stream"] and body["settings"]["max_tokens"] == planned.max_tokens
        elif planned.surface == "chat":
            assert body["stream_options"] == {"include_usage": True}
            assert body["messages"][0]["content"][0]["image_url"]["url"] == picture.data_url
        else:
            assert body["type"] == "response.create" and body["stream_id"] == f"r{planned.index}"
            assert body["max_output_tokens"] == planned.max_tokens
