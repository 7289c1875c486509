"""How many workers there should be: rises and falls with the load, and does not flap."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from degas.on_ray.scaling import (
    History,
    ScaleLimits,
    WorkerLoad,
    choose_leavers,
    decide,
    workers_asked_for,
)

IDLE = WorkerLoad(0, 0, max_rows=8, pages_in_use=0, total_pages=100)
BUSY = WorkerLoad(8, 8, max_rows=8, pages_in_use=40, total_pages=100)
LIMITS = ScaleLimits(1, 8, target_load=0.8, up_after_s=5.0, down_after_s=60.0)


class Clockwork:
    """`decide`, once a second."""

    def __init__(self, wanted: int = 1, limits: ScaleLimits = LIMITS) -> None:
        self.history, self.now_s, self.wanted, self.limits = History(), 0.0, wanted, limits

    def run(self, seconds: int, *loads: WorkerLoad) -> list[int]:
        """What was wanted after each second."""
        told = []
        for _ in range(seconds):
            self.now_s += 1.0
            self.history, self.wanted = decide(self.history, self.now_s, self.wanted, loads, self.limits)
            told.append(self.wanted)
        return told


@pytest.mark.parametrize(
    ("load", "number"),
    [
        (IDLE, 1),
        (replace(IDLE, num_running=6), 1),
        (replace(IDLE, num_running=8), 2),  # all rows taken is more than 0.8 of them
        (BUSY, 3),  # two workers' worth of sequences at 0.8
        (replace(IDLE, num_running=2, pages_in_use=90), 2),  # pages are short, rows are not
        (
            replace(IDLE, num_running=2, num_waiting=6, pages_in_use=90),
            5,
        ),  # and six wait for pages, not for rows
        (WorkerLoad(0, 0, max_rows=0, pages_in_use=0, total_pages=0), 1),
    ],
)
def test_what_is_asked_for_is_the_larger_of_rows_and_pages(load: WorkerLoad, number: int) -> None:
    assert workers_asked_for([load], 0.8) == number


def test_exactly_the_target_is_enough() -> None:
    tenth = replace(IDLE, max_rows=10)
    assert workers_asked_for([replace(tenth, num_running=8)], 0.8) == 1
    assert workers_asked_for([replace(tenth, num_running=8)] * 3, 0.8) == 3


def test_what_is_asked_for_does_not_depend_on_how_the_load_is_spread() -> None:
    together = [replace(BUSY, num_waiting=24), IDLE]
    apart = [replace(BUSY, num_waiting=8), replace(BUSY, num_waiting=8)]
    assert workers_asked_for(together, 0.8) == workers_asked_for(apart, 0.8)


def test_more_are_wanted_after_a_while_and_at_most_twice_as_many() -> None:
    flood = replace(BUSY, num_waiting=500)
    clock = Clockwork()
    told = clock.run(20, flood)
    assert told[:5] == [1] * 5
    assert told[5:11] == [2] * 6
    assert told[11:17] == [4] * 6
    assert told[17:] == [8] * 3
    assert clock.run(20, flood)[-1] == LIMITS.max_workers


def test_a_moment_of_load_adds_nobody() -> None:
    clock = Clockwork()
    for _ in range(30):
        assert set(clock.run(4, BUSY) + clock.run(1, IDLE)) == {1}


def test_fewer_are_wanted_only_after_a_quiet_time_and_then_at_once() -> None:
    clock = Clockwork(wanted=4)
    told = clock.run(62, IDLE, IDLE, IDLE, IDLE)
    assert told[:60] == [4] * 60
    assert told[-1] == 1


def test_load_that_comes_and_goes_keeps_its_workers() -> None:
    clock = Clockwork(wanted=3)
    for _ in range(20):
        assert set(clock.run(4, BUSY, IDLE, IDLE) + clock.run(40, IDLE, IDLE, IDLE)) == {3}


def test_nobody_is_taken_away_while_one_is_missing() -> None:
    clock = Clockwork(wanted=3)
    assert set(clock.run(200, IDLE, IDLE)) == {3}
    assert clock.run(1, IDLE, IDLE, IDLE) == [1]


def test_without_figures_nothing_changes() -> None:
    clock = Clockwork(wanted=3)
    assert set(clock.run(200)) == {3}


def test_equal_bounds_are_a_fixed_number() -> None:
    clock = Clockwork(wanted=5, limits=ScaleLimits(2, 2, up_after_s=0, down_after_s=0))
    assert set(clock.run(5, replace(BUSY, num_waiting=900)) + clock.run(5, IDLE, IDLE)) == {2}


def test_who_leaves_has_least_to_lose() -> None:
    loads = {1: IDLE, 2: BUSY, 3: None, 4: IDLE}
    assert choose_leavers(loads, 2) == [3, 4]
    assert choose_leavers(loads, 4) == [3, 4, 1, 2]
    assert choose_leavers(loads, 0) == []


LOADS = st.builds(
    WorkerLoad,
    st.integers(0, 32),
    st.integers(0, 500),
    max_rows=st.integers(1, 32),
    pages_in_use=st.integers(0, 100),
    total_pages=st.just(100),
)


@given(st.lists(st.tuples(st.floats(0, 100), st.lists(LOADS, max_size=5)), max_size=40), st.integers(0, 20))
def test_bounds_hold_whatever_happens(events: list[tuple[float, list[WorkerLoad]]], wanted: int) -> None:
    history, now_s = History(), 0.0
    for passed_s, loads in events:
        now_s += passed_s
        before = min(max(wanted, LIMITS.min_workers), LIMITS.max_workers)
        history, wanted = decide(history, now_s, wanted, loads, LIMITS)
        assert LIMITS.min_workers <= wanted <= min(2 * before, LIMITS.max_workers)
        assert len(history.answers) <= len(events)
        if wanted > before:
            assert workers_asked_for(loads, LIMITS.target_load) >= wanted
