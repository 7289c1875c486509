"""A device a hundred times too slow, on a virtual clock: judged as the supervisor judges, it is slow and never hung."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from shared.errors import FinishReason
from tests.unit.worker.loop.simulation import Simulation
from worker.schedule.pace import Pace, guessed_costs
from worker.sim.profiles import TEST, Profile

PROGRESS_TIMEOUT_S = 3.0
STEP_S, GAP_S = 0.25, 0.125
CONTEXT = 2048
SLOW = Profile("slow", {1: 0.01, 32: 0.06}, 1e-3, prefill_token_s=2e-3, crop_s=0.4, key_s=5e-7)


@dataclass
class Judge:
    """Watches heartbeats: silence beyond what the last one expected is a hang."""

    until_s: float = PROGRESS_TIMEOUT_S
    expected: list[float] = field(default_factory=list)
    clock: object = None

    def on_beat(self, steps: int, expected_s: float) -> None:
        now_s = self.clock.now()  # type: ignore[attr-defined]
        assert now_s <= self.until_s, f"silent until {now_s:.2f}, and taken for hung at {self.until_s:.2f}"
        self.until_s = now_s + expected_s + PROGRESS_TIMEOUT_S
        self.expected.append(expected_s)


def slow_worker(
    profile: Profile = SLOW, pace: Pace | None = None, **options: object
) -> tuple[Simulation, Judge]:
    judge = Judge()
    given: dict[str, object] = {
        "max_rows": 32,
        "num_pages": 32 * CONTEXT // 16 + 1,
        "page_tokens": 16,
        "step_tokens": 2048,
        "mixed_tokens": 1024,
        "max_sequence_tokens": CONTEXT,
        "exact": False,
        "profile": profile,
        "pace": pace or Pace(guessed_costs(10**8, 5e9), step_s=STEP_S, gap_s=GAP_S),
        "on_beat": judge.on_beat,
        **options,
    }
    sim = Simulation(**given)
    judge.clock = sim.clock
    return sim, judge


def text(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(20, 90) for _ in range(num_tokens)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_guess_that_is_far_too_quick_makes_no_silent_first_step(depth: int) -> None:
    """The longest prompt comes first of all, to a device of which nothing was measured yet."""
    pace = Pace(guessed_costs(1, 1e9), step_s=STEP_S, gap_s=GAP_S)
    sim, _ = slow_worker(SLOW.slowed("slower", 10), pace, depth=depth)
    streams = [sim.submit(text(random.Random(1), num), 3) for num in (CONTEXT - 4, 20, 30)]
    sim.run()
    assert all(stream.finish is not None for stream in streams)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_to_the_context_limit_thirty_two_at_once(depth: int) -> None:
    rng = random.Random(depth)
    sim, _ = slow_worker(depth=depth)
    running = sim.submit(text(rng, 8), 2000)
    while len(running.tokens) < 20:
        sim.engine.tick()
    prompts = [sim.submit(text(rng, CONTEXT - 4), 3) for _ in range(31)]
    gaps, last_s, seen = [], sim.clock.now(), len(running.tokens)
    while not all(stream.finish for stream in prompts):
        sim.engine.tick()
        if len(running.tokens) > seen:
            gaps.append(sim.clock.now() - last_s)
            last_s, seen = sim.clock.now(), len(running.tokens)
        elif running.finish:
            break
    sim.run()
    for stream in prompts:
        assert stream.rejected is None and stream.finish is not None
        assert stream.finish.reason in (FinishReason.LENGTH, FinishReason.STOP)
    # The bound is met up to what the device had not shown yet: costs are learned from the first few steps.
    assert len(gaps) > 20 and max(gaps[10:]) < 1.5 * GAP_S


def test_without_a_bound_such_a_step_is_announced_and_not_taken_for_a_hang() -> None:
    sim, judge = slow_worker(pace=Pace(guessed_costs(10**8, 5e9)))
    stream = sim.submit(text(random.Random(1), CONTEXT - 4), 3)
    sim.run()
    assert stream.finish is not None and max(judge.expected) > PROGRESS_TIMEOUT_S


def test_a_pictures_own_crops_are_one_step_and_announced() -> None:
    """A picture cannot be cut, and its crops take longer than the bound."""
    profile = TEST.slowed("slow", 100)
    profile = Profile("pictures", profile.forward_s, 1e-3, prefill_token_s=1e-3, crop_s=4.0)
    sim, judge = slow_worker(profile)
    streams = [sim.submit([30, 31], 4, image=bytes([number])) for number in range(4)]
    sim.run()
    assert all(stream.finish is not None for stream in streams)
    assert max(judge.expected) > PROGRESS_TIMEOUT_S


def test_an_idle_worker_expects_nothing() -> None:
    sim, judge = slow_worker()
    sim.submit([30, 31], 4)
    sim.run()
    sim.clock.sleep_until(sim.clock.now() + 0.6)
    sim.tick()
    assert judge.expected[-1] == 0.0
