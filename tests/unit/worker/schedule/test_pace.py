"""Steps within a time: what is learned of a device, and what is planned by it."""

from __future__ import annotations

import random

import pytest

from tests.unit.worker.schedule.examples import plan_of, result_of, scheduler, sequence
from worker.schedule.pace import (
    LEAST_TOKENS,
    Pace,
    StepCosts,
    StepLoad,
    guessed_costs,
    load_of_chunk,
    load_of_step,
)
from worker.schedule.scheduler import Scheduler

SLOW = StepCosts(step_s=0.03, row_s=0.004, row_key_s=15e-6, token_s=0.004, key_s=1e-6, crop_s=0.8)
"""A model of some hundred million weights on two cores of a laptop."""


def true_s(load: StepLoad) -> float:
    return SLOW.of(load)


def known(costs: StepCosts, *, step_s: float = 0.0, gap_s: float = 0.0) -> Pace:
    """A pace whose costs were measured."""
    pace = Pace(costs, step_s=step_s, gap_s=gap_s)
    pace.is_guess = False
    return pace


def load_of(rng: random.Random) -> StepLoad:
    rows = rng.choice([0, 0, 1, 8])
    tokens = rng.choice([0, 16, 40, 200]) if rows else rng.choice([16, 40, 200])
    start = rng.choice([0, 500, 4000])
    return load_of_step([600] * rows, [load_of_chunk(start, tokens, 0)])


def test_costs_are_learned_from_steps_however_wrong_the_guess() -> None:
    for guess in (guessed_costs(1, 1e12), guessed_costs(10**9, 1e9)):
        pace, rng = Pace(guess, step_s=0.25), random.Random(1)
        for _ in range(300):
            load = load_of(rng)
            pace.on_step(load, true_s(load) * rng.uniform(0.9, 1.1))
        ratios = [pace.costs.of(load) / true_s(load) for load in (load_of(rng) for _ in range(100))]
        assert min(ratios) > 0.5 and max(ratios) < 2.0


def test_one_step_that_stalls_changes_little_and_is_forgotten() -> None:
    pace, load = Pace(SLOW, step_s=0.25), StepLoad(num_tokens=40, num_keys=800)
    pace.on_step(load, true_s(load))
    pace.on_step(load, 100 * true_s(load))
    assert pace.costs.of(load) < 3 * true_s(load)
    for _ in range(8):
        pace.on_step(load, true_s(load))
    assert pace.costs.of(load) < 1.2 * true_s(load)


@pytest.mark.parametrize("start", [0, 100, 8000])
def test_what_fits_into_a_time_takes_that_time(start: int) -> None:
    pace = Pace(SLOW)
    num_tokens = pace.tokens_within(0.5, start)
    assert pace.chunk_s(start, num_tokens, 0) <= 0.5 < pace.chunk_s(start, num_tokens + 1, 0)


def test_without_a_bound_everything_fits_and_without_time_nothing_does() -> None:
    pace = Pace(SLOW)
    assert pace.tokens_within(pace.bound_s(decodes=True), 0) > 10**6
    assert pace.tokens_within(0.0, 0) == pace.tokens_within(-1.0, 0) == 0


def test_a_prompt_is_cut_into_steps_that_stay_within_their_time() -> None:
    steps = scheduler(
        num_pages=400, step_tokens=2048, mixed_tokens=1024, pace=known(SLOW, step_s=0.25, gap_s=0.125)
    )
    seq = sequence(1000)
    steps.submit(seq)
    times = []
    while seq.in_prefill:
        plan = plan_of(steps)
        times.append(true_s(plan.load))
        assert plan.expected_s == pytest.approx(times[-1])
        steps.commit(plan, result_of(plan), 0.0)
    assert max(times) <= 0.25 and len(times) > 10


@pytest.mark.parametrize("guess", [guessed_costs(135_000_000, 5e9), guessed_costs(1, 1e12)])
def test_until_a_step_was_measured_steps_are_short_however_quick_the_guess(guess: StepCosts) -> None:
    steps = scheduler(num_pages=400, step_tokens=2048, pace=Pace(guess, step_s=0.25))
    steps.submit(sequence(1000, number=1))
    steps.submit(sequence(20, number=2))
    plans = [plan_of(steps), plan_of(steps)]  # the second is launched before the first comes back
    assert [[chunk.num_tokens for chunk in plan.chunks] for plan in plans] == [[LEAST_TOKENS]] * 2
    steps.commit(plans[0], result_of(plans[0]), 0.0, busy_s=1e-3)
    assert plan_of(steps).chunks[0].num_tokens > LEAST_TOKENS


def test_rows_that_decode_wait_for_their_gap_and_no_longer() -> None:
    steps = scheduler(num_pages=400, mixed_tokens=1024, pace=known(SLOW, step_s=1.0, gap_s=0.2))
    running = sequence(3, number=1, max_tokens=99)
    steps.submit(running)
    plan = plan_of(steps)
    steps.commit(plan, result_of(plan), 0.0)
    steps.submit(sequence(900, number=2))
    plan = plan_of(steps)
    assert plan.decode == [running] and plan.chunks and true_s(plan.load) <= 0.2


def test_prefill_goes_on_where_decode_rows_take_all_of_the_time() -> None:
    steps = scheduler(num_pages=400, mixed_tokens=1024, pace=known(SLOW, step_s=0.25, gap_s=0.01))
    steps.submit(sequence(3, number=1, max_tokens=99))
    plan = plan_of(steps)
    steps.commit(plan, result_of(plan), 0.0)
    steps.submit(sequence(900, number=2))
    assert [chunk.num_tokens for chunk in plan_of(steps).chunks] == [LEAST_TOKENS]


def decoding_rows(steps: Scheduler, num_prompts: int) -> int:
    """How many of so many short prompts decode together, once all that may have begun have their first token."""
    for number in range(num_prompts):
        steps.submit(sequence(3, number=number, max_tokens=400))
    for _ in range(100):
        plan = plan_of(steps)
        steps.commit(plan, result_of(plan), 0.0)
    return len(plan.decode)


@pytest.mark.parametrize("gap_s", [0.33, 0.36, 0.4])
def test_rows_wait_where_more_of_them_would_widen_the_gaps(gap_s: float) -> None:
    """The rows' own time counts: so many decode that their step and the least piece of a prompt fit into the gap."""
    steps = scheduler(num_pages=2000, max_rows=64, pace=Pace(SLOW, step_s=0.25, gap_s=gap_s))
    rows = decoding_rows(steps, 64)
    assert 1 < rows < 64 and len(steps.waiting) == 64 - rows
    least = load_of_chunk(0, LEAST_TOKENS, 0)
    assert (
        true_s(load_of_step([3] * rows, [least])) <= gap_s < true_s(load_of_step([100] * (rows + 1), [least]))
    )


@pytest.mark.parametrize("gap_s", [0.0, 0.001, 0.05])
def test_a_gap_that_one_row_hardly_keeps_does_not_serve_rows_one_by_one(gap_s: float) -> None:
    """The floor: twice what a row's step takes alone with the least piece of a prompt. 0: no bound."""
    steps = scheduler(num_pages=2000, max_rows=64, pace=Pace(SLOW, step_s=0.25, gap_s=gap_s))
    rows = decoding_rows(steps, 64)
    least = load_of_chunk(0, LEAST_TOKENS, 0)
    alone_s = true_s(load_of_step([3], [least]))
    assert (rows == 64) == (gap_s == 0)
    assert not gap_s or 0.9 < true_s(load_of_step([3] * rows, [least])) / (2 * alone_s) <= 1


def test_a_second_prompt_joins_where_there_is_time_for_more_than_a_little() -> None:
    for step_s, expected in ((0.25, 1), (0.6, 2)):
        steps = scheduler(num_pages=400, pace=known(SLOW, step_s=step_s))
        steps.submit(sequence(30, number=1))
        steps.submit(sequence(30, number=2))
        assert len(plan_of(steps).chunks) == expected
