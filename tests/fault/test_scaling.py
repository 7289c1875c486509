"""Several workers and gateways beside one, the short form; figures are `degas bench scaling`'s."""

from __future__ import annotations

import dataclasses

import pytest

from loadtest.bench.flood import row_of
from loadtest.bench.flood_client import Phase
from loadtest.bench.scaling import ScalingReport, Size, flood, many, measure, merge, saturate

SMALL = Size(workers=2, gateways=2, rows=4, queue=4, tokens=8, profile="b200", seconds=0.8, rounds=1)


@pytest.mark.slow
def test_a_flood_before_two_workers_and_two_gateways_is_answers_and_proper_refusals() -> None:
    with many(SMALL) as (running, probes):
        saturated = saturate(running, SMALL, 0)
        flooded = flood(running, SMALL, 0, 5.0, saturated.goodput, probes)
    assert saturated.failed == flooded.failed == 0
    assert saturated.finished > 0 and flooded.finished > 0
    # Beyond what is served everybody is told so, and when to come again.
    assert 0 < flooded.refused < flooded.sent
    assert not flooded.without_retry_after
    assert all(0.1 <= wait_s <= 60 for wait_s in flooded.retry_after_s)
    (row,) = [row_of([flooded], [saturated])]
    report = ScalingReport(SMALL, 10.0, 19.5, 1.95, 0, 10.0, 5.0, [row])
    assert report.to_json()["promised"] == pytest.approx(1.933, abs=0.001)


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
