"""When a dead child is started again, and when no more: pure."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from degas.restarts import RestartLimits, Restarts


def delays(lives: list[float | None], **limits: float) -> list[float | None]:
    restarts = Restarts(RestartLimits(**limits))  # type: ignore[arg-type]
    return [restarts.on_death(ready_for_s) for ready_for_s in lives]


def test_a_child_that_has_served_is_started_again_at_once() -> None:
    assert delays([4.5] * 50) == [0.0] * 50


def test_failed_starts_back_off_and_end() -> None:
    assert delays([None] * 5) == [0.2, 0.4, 0.8, 1.6, None]


def test_brief_lives_back_off_after_the_second_to_a_bound_and_end() -> None:
    assert delays([0.1] * 10) == [0.0, 0.0, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert delays([0.1] * 20)[-2:] == [10.0, None]


def test_a_life_of_some_seconds_breaks_the_row() -> None:
    restarts = Restarts(RestartLimits())
    for _ in range(30):
        assert restarts.on_death(0.5) == 0.0 and restarts.on_death(None) is not None
        assert restarts.on_death(6.0) == 0.0
    assert restarts.quick_deaths == 0 and restarts.num_deaths == 90


@given(st.lists(st.sampled_from([None, 0.0, 0.5, 1.0, 7.0, 1e5]), max_size=60))
def test_any_row_of_deaths(lives: list[float | None]) -> None:
    """A delay comes only in a row of quick deaths, is bounded, and the end only behind a long enough one."""
    restarts = Restarts(RestartLimits())
    row = 0
    for ready_for_s in lives:
        delay_s = restarts.on_death(ready_for_s)
        row = 0 if ready_for_s is not None and ready_for_s >= 1.0 else row + 1
        assert restarts.quick_deaths <= row
        if delay_s is None:
            assert row >= 5
            return
        assert 0.0 <= delay_s <= 10.0
        assert row or delay_s == 0.0
