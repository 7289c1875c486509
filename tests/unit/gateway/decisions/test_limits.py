"""Limits of a key: what fits, what is refused and for how long, and that nothing is counted twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decisions.limits import Bucket, Meter, Meters
from gateway.generation import RequestError, Usage
from gateway.keys import KeyEntry
from shared.errors import ErrorCode


def entry(name: str = "a", **limits: Any) -> KeyEntry:
    return KeyEntry(name=name, hash="sha256:" + "0" * 64, **limits)


def meter(**limits: Any) -> Meter:
    made = Meter(entry())
    made.change(entry(**limits), 0.0)
    return made


def refusal(function: object, *args: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        function(*args)  # type: ignore[operator]
    return caught.value


def test_requests_a_minute() -> None:
    one = meter(requests_per_minute=2)
    one.on_request(0.0)
    one.on_request(0.0)
    error = refusal(one.on_request, 0.0)
    assert error.code is ErrorCode.RATE_LIMITED and error.param == "requests_per_minute"
    assert 29.9 < error.retry_after_s <= 30.01
    one.on_request(error.retry_after_s)
    assert (one.totals.requests, one.totals.refused) == (3, 1)


def test_tokens_are_owed_after_a_long_answer() -> None:
    one = meter(tokens_per_minute=60)
    one.on_request(0.0)
    one.on_submit(20, 0.0)
    one.on_end(Usage(prompt_tokens=20, completion_tokens=100), 0.0)
    error = refusal(one.on_request, 0.0)
    assert error.param == "tokens_per_minute" and 60 < error.retry_after_s < 62
    one.on_request(error.retry_after_s)
    assert refusal(one.on_submit, 30, error.retry_after_s).param == "tokens_per_minute"
    assert (one.totals.prompt_tokens, one.totals.generated_tokens, one.num_streams) == (20, 100, 0)


def test_a_prompt_that_never_fits_is_no_matter_of_waiting() -> None:
    error = refusal(meter(tokens_per_minute=60).on_submit, 61, 0.0)
    assert error.code is ErrorCode.INVALID_REQUEST and "60" in error.message


def test_answers_at_once() -> None:
    one = meter(max_streams=2)
    one.on_submit(5, 0.0)
    one.on_submit(5, 0.0)
    assert refusal(one.on_submit, 5, 0.0).param == "max_streams"
    one.take_back(5, 0.0)
    one.on_submit(5, 0.0)
    one.on_end(Usage(), 0.0)
    assert one.num_streams == 1 and one.totals.prompt_tokens == 10


def test_headers_as_openai_spells_them() -> None:
    one = meter(requests_per_minute=60, tokens_per_minute=6000)
    one.on_request(0.0)
    one.on_submit(5999, 0.0)
    assert one.headers(0.0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "1",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    assert one.headers(0.995)["x-ratelimit-reset-requests"] in ("5ms", "6ms")
    assert meter(max_streams=1).headers(0.0) == {}


def test_a_reload_keeps_what_was_used() -> None:
    meters = Meters()
    meters.set([entry(requests_per_minute=1), entry("b")], 0.0)
    one = meters.of(entry().handle)
    assert one is not None
    one.on_request(0.0)
    meters.set([entry(requests_per_minute=1, max_streams=3)], 1.0)
    assert meters.of(entry().handle) is one and one.entry.max_streams == 3 and len(meters.all()) == 1
    assert refusal(one.on_request, 1.0).param == "requests_per_minute"
    meters.set([entry(requests_per_minute=5)], 1.0)
    one.on_request(1.0)
    rotated = KeyEntry(name="a", hash="sha256:" + "1" * 64)
    meters.set([rotated], 1.0)
    assert meters.of(entry().handle) is None and meters.of(rotated.handle) is not one


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 20)), max_size=40), st.integers(1, 100))
def test_no_more_than_a_minutes_worth_and_what_flows_in(moves: list[tuple[float, int]], limit: int) -> None:
    bucket, now_s, taken = Bucket(limit, 0.0), 0.0, 0
    for passed_s, number in moves:
        now_s += passed_s
        wait_s = bucket.wait_s(number, now_s)
        if number <= limit:
            assert wait_s <= 60.0 + 1e-6
        if wait_s == 0.0:
            bucket.take(number, now_s)
            taken += number
        assert taken <= limit + now_s * limit / 60 + 1e-6
