"""Small sequences, plans and results for tests by example."""

from __future__ import annotations

from typing import Any

from shared.protocol import Sampling
from worker.schedule.life import Life, MaskLife
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pace import Pace
from worker.schedule.pages import PagePool
from worker.schedule.plan import StepPlan, StepResult
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.scheduler import Scheduler
from worker.schedule.sequence import Sequence


def sequence(tokens: list[int] | int = 3, *, number: int = 0, max_tokens: int = 4, **fields: Any) -> Sequence:
    """A sequence of these prompt tokens, or of so many."""
    if isinstance(tokens, int):
        tokens = list(range(20, 20 + tokens))
    return Sequence(
        b"gateway",
        number,
        f"r{number}",
        list(tokens),
        len(tokens),
        max_tokens,
        Sampling(),
        frozenset(),
        0.0,
        **fields,
    )


def life_of(seq: Sequence) -> Life:
    """Its life now. A type checker that has seen `seq.life is …` takes that for true after the next call too."""
    return seq.life


def mask_of(seq: Sequence) -> MaskLife:
    """Its mask's life now; see `life_of`."""
    return seq.mask


def scheduler(
    *, num_pages: int = 33, page_tokens: int = 4, cache: bool = False, pace: Pace | None = None, **limits: Any
) -> Scheduler:
    """Two rows and steps of 64 tokens, unless told otherwise."""
    pool = PagePool(num_pages, page_tokens)
    given = {"max_rows": 2, "step_tokens": 64, "mixed_tokens": 64, "max_sequence_tokens": 1024, **limits}
    return Scheduler(SchedulerLimits(**given), pool, PrefixCache(pool) if cache else None, pace=pace)


def plan_of(steps: Scheduler) -> StepPlan:
    """The next plan; there is one."""
    plan = steps.plan(0.0)
    assert plan is not None
    return plan


def result_of(plan: StepPlan, token_id: int = 50) -> StepResult:
    """The same token for every sample."""
    return StepResult([token_id] * len(plan.samples), [False] * len(plan.samples))
