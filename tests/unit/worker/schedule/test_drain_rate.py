"""How fast sequences end, as gateways are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.schedule.drain_rate import LEAST_WINDOW_S, WINDOW_S, DrainRate


def test_a_crowded_start_is_not_taken_for_slowness() -> None:
    rate = DrainRate()
    assert rate.per_s(10.0, 160) == 0.0, "nothing is known yet"
    for i in range(40):
        rate.on_end(10.0 + (i + 1) * 0.025)
        assert rate.per_s(10.0 + (i + 1) * 0.025, 160) in (0.0, pytest.approx(40.0))
    assert rate.per_s(11.0, 120) == pytest.approx(40.0)


def test_idle_time_before_does_not_count_and_the_window_moves_on() -> None:
    rate = DrainRate()
    for i in range(10):
        rate.on_end(i * 0.5)
    assert rate.per_s(4.9, 0) == pytest.approx(2.0)
    assert rate.per_s(100.0, 3) == 0.0
    rate.on_end(101.0)
    assert rate.per_s(101.0, 3) == pytest.approx(1.0)
    assert rate.per_s(110.0, 3) == 0.0


@given(
    st.floats(1.0, 50.0), st.floats(0.0, 30.0), st.floats(LEAST_WINDOW_S + 0.01, 20.0), st.integers(1, 500)
)
def test_a_steady_worker_is_measured_as_it_is(
    per_s: float, idle_s: float, crowded_s: float, waiting: int
) -> None:
    rate = DrainRate()
    rate.per_s(idle_s, waiting)
    for i in range(int(per_s * crowded_s)):
        rate.on_end(idle_s + (i + 1) / per_s)
    window_s = min(WINDOW_S, crowded_s)
    assert rate.per_s(idle_s + crowded_s, waiting) == pytest.approx(per_s, abs=1.01 / window_s)
