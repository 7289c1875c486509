"""Which prompts a worker asks a prefill worker for, and how much may be on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from shared.protocol import PrefillAt, Sampling
from tests.unit.worker.loop.simulation import Simulation
from tests.unit.worker.schedule.examples import sequence
from worker.loop.inbox import PagesHere, PrefillEnded, PrefillJob
from worker.schedule.sequence import Picture, Run, Sequence

AT = PrefillAt("p", 8)
PROMPT = list(range(20, 41))  # 21 tokens: five whole pages of four, and one


@dataclass
class Asked:
    """A prefill worker that answers nothing by itself."""

    jobs: list[PrefillJob] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def ask(self, job: PrefillJob) -> None:
        self.jobs.append(job)

    def cancel(self, job_id: int) -> None:
        self.cancelled.append(job_id)


class Scene:
    def __init__(self, **options: Any) -> None:
        self.asked = Asked()
        self.sim = Simulation(prefills=self.asked, **options)
        assert self.sim.intake is not None
        self.intake = self.sim.intake

    def queue(self, tokens: list[int], number: int = 0, **fields: Any) -> Sequence:
        seq = sequence(tokens, number=number, **fields)
        self.sim.scheduler.submit(seq)
        self.intake.begin(seq, AT)
        return seq

    @property
    def outcomes(self) -> dict[str, int]:
        return self.sim.engine.metrics.prefills_total


def awaits(seq: Sequence) -> bool:
    """Now. A type checker that has seen the attribute takes its value for the same after the next call."""
    return seq.awaits_pages


def test_whole_pages_without_the_last_token_are_asked_for() -> None:
    scene = Scene()
    seq = scene.queue(PROMPT)
    (job,) = scene.asked.jobs
    assert (job.first_page, job.num_pages, len(job.prompt)) == (0, 5, 4 * 20) and seq.awaits_pages
    assert scene.sim.scheduler.plan(0.0) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"pictures": [Picture((Run(1, 9, 0),), [], [], b"d")]},
        {"values": {-3: (0.5, 0.5)}},
        {"tokens": PROMPT[:7]},
        {"tokens": PROMPT[:4]},
        {"sampling": Sampling(num_prompt_logprobs=0)},
    ],
)
def test_what_is_computed_here(fields: dict[str, Any]) -> None:
    scene = Scene()
    sampling = fields.pop("sampling", None)
    seq = sequence(fields.pop("tokens", PROMPT), **fields)
    if sampling is not None:
        seq.sampling = sampling
    scene.intake.begin(seq, AT)
    assert not scene.asked.jobs and not seq.awaits_pages and not scene.outcomes


def test_so_many_bytes_are_on_their_way_and_one_prompt_always_may() -> None:
    scene = Scene(prefill_bytes=32)
    first, second = scene.queue(PROMPT), scene.queue([9, *PROMPT], 1)
    assert [awaits(first), awaits(second)] == [True, False]
    assert scene.outcomes == {"asked": 1, "busy": 1}
    scene.intake.on_command(PrefillEnded(scene.asked.jobs[0].job_id, "refused"))
    assert not scene.intake.turn() and not awaits(first)
    assert scene.queue([8, *PROMPT], 2).awaits_pages


def test_what_would_not_fit_beside_what_runs_is_not_asked_for() -> None:
    scene = Scene(num_pages=8)
    for _ in range(3):
        scene.sim.pool.take()
    scene.queue(PROMPT)
    assert not scene.asked.jobs and scene.outcomes == {"no_room": 1}


def test_pages_out_of_turn_end_it_and_what_comes_later_is_passed_over() -> None:
    scene = Scene()
    seq = scene.queue(PROMPT)
    (job,) = scene.asked.jobs
    for _ in range(2):
        scene.intake.on_command(PagesHere(job.job_id, 1, bytes(16), bytes(32)))
    scene.intake.on_command(PrefillEnded(job.job_id, "done"))
    scene.intake.turn()
    assert scene.outcomes == {"asked": 1, "malformed": 1} and scene.asked.cancelled == [job.job_id]
    assert not seq.awaits_pages and not len(scene.intake)


def test_an_end_before_all_pages_came_is_no_good_end() -> None:
    scene = Scene()
    scene.queue(PROMPT)
    scene.intake.on_command(PrefillEnded(scene.asked.jobs[0].job_id, "done"))
    scene.intake.turn()
    assert scene.outcomes == {"asked": 1, "malformed": 1}


def test_a_turn_takes_a_bounded_time_and_says_that_more_has_come() -> None:
    scene = Scene(prefill_wait_s=1e6)
    for number in range(3):
        scene.queue([number, *PROMPT], number)
    times = iter(range(100))
    scene.intake._clock = lambda: float(next(times))  # each look at the clock is a second later
    for job in scene.asked.jobs:
        scene.intake.on_command(PrefillEnded(job.job_id, "refused"))
    assert scene.intake.turn() and len(scene.intake) == 2
    assert scene.intake.turn() and not scene.intake.turn() and not len(scene.intake)
