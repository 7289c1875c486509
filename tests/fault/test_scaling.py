"""Several workers and gateways beside one, the short form; figures are `degas bench scaling`'s."""

from __future__ import annotations

import dataclasses

import pytest

from loadtest.bench.flood_client import Phase
from loadtest.bench.scaling import Size, measure, merge

SMALL = Size(workers=2, gateways=2, rows=4, queue=4, tokens=8, seconds=0.8, rounds=1, factors=(5.0,))


@pytest.mark.slow
def test_a_flood_before_two_workers_and_two_gateways_is_answers_and_proper_refusals() -> None:
    report = measure(SMALL)
    assert report.failed == 0 and report.many_per_s > 0
    (flooded,) = report.rows
    assert flooded.failed == 0 and flooded.goodput_per_s > 0
    # Beyond what is served everybody is told so, and when to come again.
    assert 0 < flooded.refused <= flooded.sent_per_s * SMALL.seconds
    assert flooded.all_say_retry_after
    assert 100 <= flooded.retry_after_ms[0] <= flooded.retry_after_ms[1] <= 60_000


def test_counts_of_several_clients_add_up() -> None:
    one, two = Phase(2.0, 4.0), Phase(2.0, 4.0)
    one.sent, two.sent, one.finished, two.finished = 10, 20, 5, 7
    one.ttft.record(0.1)
    two.ttft.record(0.2)
    two.retry_after_s.append(0.5)
    whole = merge([one, two])
    assert (whole.factor, whole.seconds, whole.sent, whole.finished) == (2.0, 4.0, 30, 12)
    assert whole.goodput == 3.0 and whole.retry_after_s == [0.5] and len(whole.ttft) == 2


@pytest.mark.parametrize("field", ["workers", "gateways", "rows", "queue", "tokens", "seconds", "rounds"])
def test_sizes_that_cannot_be_run_say_what_would_work(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0; .* would work, such as"):
        measure(dataclasses.replace(SMALL, **{field: 0}))  # type: ignore[arg-type]
