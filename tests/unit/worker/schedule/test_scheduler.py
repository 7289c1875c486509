"""The scheduler by example: admission, chunks, rows, finish, release and preemption, one rule a test."""

from __future__ import annotations

import pytest

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Sheet
from tests.unit.worker.schedule.examples import life_of, plan_of, result_of, scheduler, sequence
from worker.schedule.life import Life
from worker.schedule.pace import Pace, StepCosts
from worker.schedule.plan import crops_of
from worker.schedule.refusal import Refusal
from worker.schedule.sequence import Picture, Run, Sequence


def test_a_prompt_is_prefilled_and_then_decodes_a_token_a_step() -> None:
    steps = scheduler()
    seq = sequence(3, max_tokens=2)
    steps.submit(seq)
    first = plan_of(steps)
    assert [(c.start, c.num_tokens, c.is_last) for c in first.chunks] == [(0, 3, True)]
    assert first.samples == [seq] and life_of(seq) is Life.RUNNING and seq.inflight_refs == 1
    second = plan_of(steps)
    assert second.decode == [seq] and second.positions == [3] and second.sample_indexes == [1]
    assert steps.plan(0.0) is None, "I12: a third token is never launched"
    assert steps.commit(first, result_of(first), 1.0).token_ids == [50]
    done = steps.commit(second, result_of(second), 2.0)
    assert done.finished == [seq] and seq.finish is FinishReason.LENGTH
    assert seq.life is Life.RELEASED and steps.pages.num_allocated == 0 and not steps.has_work


def test_a_long_prompt_is_cut_at_pages_and_sampled_with_its_last_chunk() -> None:
    steps = scheduler(step_tokens=10)
    steps.submit(sequence(18))
    chunks = [plan_of(steps).chunks[0] for _ in range(2)]
    assert [(c.start, c.num_tokens, c.is_last) for c in chunks] == [(0, 8, False), (8, 10, True)]


def test_decode_rows_come_first_and_prompts_share_what_they_leave() -> None:
    steps = scheduler(max_rows=3, mixed_tokens=9)
    running = sequence(3, number=1, max_tokens=9)
    steps.submit(running)
    plan_of(steps)
    steps.submit(sequence(6, number=2))
    steps.submit(sequence(6, number=3))
    plan = plan_of(steps)
    assert plan.decode == [running]
    assert [c.num_tokens for c in plan.chunks] == [6], "two tokens of the other would end inside a page"


def test_a_bidirectional_prefix_is_never_cut() -> None:
    steps = scheduler(step_tokens=64, mixed_tokens=8)
    running = sequence(3, number=1, max_tokens=9)
    steps.submit(running)
    plan_of(steps)
    steps.submit(sequence(14, number=2, blocks=[(0, 12)]))
    assert [c.num_tokens for c in plan_of(steps).chunks] == [12], "it may overdraw the budget"


def test_a_cut_goes_before_a_block_that_does_not_fit() -> None:
    steps = scheduler(step_tokens=8, mixed_tokens=8)
    steps.submit(sequence(16, blocks=[(2, 5), (7, 12)]))
    cuts: list[int] = []
    while sum(cuts) < 16:
        plan = plan_of(steps)
        cuts.append(plan.chunks[0].num_tokens)
    assert cuts == [7, 5, 4], "page boundaries otherwise"


def test_a_chunk_ends_before_a_picture_whose_crops_overdraw_the_step() -> None:
    steps = scheduler(step_crops=3)

    def picture(at: int, crops: int) -> Picture:
        return Picture((Run(at, 4, 0),), [Sheet(1, crops, 8, 8 * crops)], [b""], bytes([at]))

    steps.submit(sequence(40, pictures=[picture(2, 2), picture(8, 1), picture(20, 1), picture(30, 5)]))
    seen = []
    for _ in range(3):
        plan = plan_of(steps)
        (chunk,) = plan.chunks
        seen.append((chunk.start, chunk.num_tokens, crops_of(chunk)))
    assert seen == [(0, 20, 3), (20, 10, 1), (30, 10, 5)], "one picture is always taken"


def test_crops_that_are_encoded_by_themselves_are_shared_out_over_steps() -> None:
    """Six crops of four positions each, a position of text before, between and behind them; a step takes two crops."""
    steps = scheduler(step_crops=2, cache=True)

    def ask(number: int) -> Sequence:
        runs = (Run(1, 12, 0), Run(14, 12, 12))
        shown = Picture(runs, [Sheet(2, 3, 16, 24)], [b""], b"shown", unit_tokens=4)
        return sequence(27, number=number, max_tokens=1, pictures=[shown])

    steps.submit(ask(1))
    seen = []
    for _ in range(3):
        plan = plan_of(steps)
        seen += [(chunk.start, chunk.num_tokens, crops_of(chunk)) for chunk in plan.chunks]
        steps.commit(plan, result_of(plan), 1.0)
    assert seen == [(0, 9, 2), (9, 9, 2), (18, 9, 2)]
    steps.submit(ask(2))
    (chunk,) = plan_of(steps).chunks
    assert (chunk.start, crops_of(chunk)) == (24, 1), "the crop that the cached pages end in is needed again"


def test_crops_fit_into_the_time_of_a_step_but_for_the_first() -> None:
    pace = Pace(StepCosts(0.0, 1e-6, 0.0, 1e-6, 0.0, 0.1), step_s=0.25)
    pace.is_guess = False
    steps = scheduler(pace=pace)
    shown = Picture((Run(0, 20, 0),), [Sheet(1, 5, 8, 40)], [b""], b"shown", unit_tokens=4)
    steps.submit(sequence(21, pictures=[shown]))
    cuts = []
    for _ in range(3):
        (chunk,) = plan_of(steps).chunks
        cuts.append((chunk.num_tokens, crops_of(chunk)))
    assert cuts == [(8, 2), (8, 2), (5, 1)]


def test_a_row_that_ends_in_flight_is_a_zombie_until_its_last_commit() -> None:
    steps = scheduler()
    seq = sequence(3, max_tokens=9)
    steps.submit(seq)
    first, second = plan_of(steps), plan_of(steps)
    assert steps.cancel(b"gateway", 0, FinishReason.CANCELLED) is seq
    assert life_of(seq) is Life.FINISHED and seq.pages, "I5"
    assert steps.cancel(b"gateway", 0, FinishReason.CANCELLED) is None
    assert steps.commit(first, result_of(first), 1.0).num_zombies == 1 and seq.pages
    assert steps.commit(second, result_of(second), 1.0).num_zombies == 1
    assert seq.life is Life.RELEASED and steps.pages.num_free == steps.pages.total
    assert sorted(steps.free_rows) == [0, 1]


def test_a_stop_id_ends_a_sequence_and_is_not_sent() -> None:
    steps = scheduler()
    seq = sequence(3)
    seq.stop_ids = frozenset({50})
    steps.submit(seq)
    plan = plan_of(steps)
    done = steps.commit(plan, result_of(plan), 1.0)
    assert done.finished == [seq] and seq.finish is FinishReason.STOP and not done.token_ids


def test_a_row_with_a_nan_ends_alone() -> None:
    steps = scheduler()
    good, bad = sequence(3, number=1), sequence(3, number=2)
    steps.submit(good)
    steps.submit(bad)
    plan = plan_of(steps)
    result = result_of(plan)
    result.bad[1] = True
    done = steps.commit(plan, result, 1.0)
    assert done.rows == [good] and done.finished == [bad]
    assert bad.error is not None and bad.error[0] is ErrorCode.NUMERICAL_ERROR


def test_without_pages_the_youngest_is_preempted_and_comes_back_first() -> None:
    steps = scheduler(num_pages=5, page_tokens=2)
    old, young = sequence(3, number=1, max_tokens=5), sequence(3, number=2, max_tokens=5)
    steps.submit(old)
    steps.submit(young)
    plan = plan_of(steps)
    steps.commit(plan, result_of(plan), 1.0)
    while young.life is Life.RUNNING:
        plan = plan_of(steps)
        steps.commit(plan, result_of(plan), 1.0)
    assert young.life is Life.WAITING and not young.pages and young.preemptions == 1
    assert steps.waiting.peek() is young and life_of(old) is Life.RUNNING
    num_generated = young.num_generated
    while old.life is Life.RUNNING:
        plan = plan_of(steps)
        steps.commit(plan, result_of(plan), 1.0)
    chunk = plan_of(steps).chunks[0]
    assert chunk.seq is young and chunk.num_tokens == 3 + num_generated, "its own tokens are prefilled again"


def test_a_waiting_sequence_that_ends_holds_nothing() -> None:
    steps = scheduler()
    seq = sequence(3, deadline_s=5.0)
    steps.submit(seq)
    assert steps.expire(4.9) == [] and steps.expire(5.0) == [seq]
    assert seq.life is Life.RELEASED and not len(steps.waiting) and steps.plan(6.0) is None


def test_a_lost_device_finishes_everything_and_releases_nothing() -> None:
    steps = scheduler()
    running, waiting = sequence(3, number=1), sequence(3, number=2)
    steps.submit(running)
    plan_of(steps)
    steps.submit(waiting)
    assert steps.abandon(ErrorCode.DEVICE_ERROR, "gone") == [running, waiting]
    assert running.finish is waiting.finish is FinishReason.ERROR and running.pages


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "param"), [(1024, 1, "prompt"), (1000, 25, "max_tokens"), (200, 1, "prompt")]
)
def test_what_can_never_fit_is_refused(tokens: int, max_tokens: int, param: str) -> None:
    steps = scheduler(num_pages=33 if tokens == 200 else 400)
    with pytest.raises(Refusal) as refused:
        steps.submit(sequence(tokens, max_tokens=max_tokens))
    assert refused.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED and refused.value.param == param


def test_a_full_queue_is_refused() -> None:
    steps = scheduler(max_rows=1, max_waiting=1)
    steps.submit(sequence(number=1))
    steps.submit(sequence(number=2))
    with pytest.raises(Refusal) as refused:
        steps.submit(sequence(number=3))
    assert refused.value.code is ErrorCode.QUEUE_FULL
