"""Durations in buckets: both ends of each bucket, both forms they are told in."""

from __future__ import annotations

from shared.histogram import Histogram
from shared.protocol import HISTOGRAM_BUCKETS_S


def test_a_bound_belongs_to_its_bucket_and_nothing_is_lost_above() -> None:
    histogram = Histogram()
    for bound_s in HISTOGRAM_BUCKETS_S:
        histogram.observe(bound_s)
    histogram.observe(0.0)
    histogram.observe(1e6)
    assert histogram.counts == [2, *[1] * (len(HISTOGRAM_BUCKETS_S) - 1), 1]


def test_the_wire_form_is_cumulative_and_ends_in_the_sum() -> None:
    histogram = Histogram()
    assert histogram.export() == [0.0] * (len(HISTOGRAM_BUCKETS_S) + 2)
    for value_s in (0.0002, 0.3, 0.4, 99.0):
        histogram.observe(value_s)
    *counts, total_s = histogram.export()
    assert counts == histogram.cumulative() and counts == sorted(counts) and counts[-1] == 4
    assert counts[HISTOGRAM_BUCKETS_S.index(0.25)] == 1 and counts[HISTOGRAM_BUCKETS_S.index(0.5)] == 3
    assert abs(total_s - 99.7002) < 1e-9
