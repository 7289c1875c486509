"""The slots' pipeline by example: launched, sampled, committed, in that order, and no other."""

from __future__ import annotations

import pytest

from worker.schedule.pipeline import InFlight, Pipeline, PipelineError, SlotState
from worker.schedule.plan import StepPlan


def plan(step: int) -> StepPlan:
    return StepPlan(step, [], [], [], [], [], [], [], [], expected_s=0.5)


def launched(pipeline: Pipeline, number: int) -> InFlight:
    return pipeline.launch(plan(number), 0.0)


def test_two_slots_take_turns_and_commit_in_the_order_of_launch() -> None:
    pipeline = Pipeline(2)
    one = launched(pipeline, 1)
    pipeline.on_sampled(one)
    two = launched(pipeline, 2)
    pipeline.on_sampled(two)
    assert (one.slot, two.slot, len(pipeline)) == (0, 1, 2)
    assert (pipeline.oldest, pipeline.newest) == (one, two)
    assert pipeline.expected_s == 1.0
    pipeline.commit(one)
    assert launched(pipeline, 3).slot == one.slot, "I4: free once its commit is done"


def test_no_step_is_launched_behind_one_that_is_not_sampled() -> None:
    pipeline = Pipeline(2)
    one = launched(pipeline, 1)
    assert not pipeline.can_launch(2)
    with pytest.raises(PipelineError, match="before the previous step was sampled"):
        launched(pipeline, 2)
    assert len(pipeline) == 1 and pipeline.newest is one
    pipeline.on_sampled(one)
    assert pipeline.can_launch(2) and not pipeline.can_launch(1)


def test_illegal_moves_change_nothing() -> None:
    pipeline = Pipeline(2)
    one = launched(pipeline, 1)
    with pytest.raises(PipelineError, match="before it was sampled"):
        pipeline.commit(one)
    pipeline.on_sampled(one)
    with pytest.raises(PipelineError, match="sampled twice"):
        pipeline.on_sampled(one)
    two = launched(pipeline, 2)
    pipeline.on_sampled(two)
    with pytest.raises(PipelineError, match="every slot in flight"):
        launched(pipeline, 3)
    with pytest.raises(PipelineError, match="out of launch order"):
        pipeline.commit(two)
    assert [step.state for step in (one, two)] == [SlotState.SAMPLED] * 2 and len(pipeline) == 2
    pipeline.commit(one)
    with pytest.raises(PipelineError):
        pipeline.commit(one)
    assert pipeline.oldest is two


def test_a_pipeline_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="a safe value is 2"):
        Pipeline(0)
