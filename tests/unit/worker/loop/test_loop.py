"""The real scheduler, pipeline, pages and engine on the simulated device: chosen scenes, then random ones."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Sampling, Trace
from tests.unit.worker.loop.simulation import GATEWAY, Simulation, Stream, check_stream, random_prompt
from worker.loop.inbox import Received
from worker.schedule.plan import StepPlan
from worker.sim.runner import NAN_TOKEN, OOM_TOKEN
from worker.step.contract import Progress


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_one_request(depth: int) -> None:
    sim = Simulation(depth=depth, num_slots=3)
    stream = sim.submit([20, 21, 22], 12)
    sim.run()
    sim.check_at_rest()
    check_stream(stream)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_random_mixtures_equal_the_oracle(depth: int, seed: int) -> None:
    rng = random.Random(seed)
    sim = Simulation(
        depth=depth,
        num_slots=3,
        max_rows=rng.randint(1, 6),
        num_pages=rng.choice([20, 40, 80]),
        page_tokens=rng.choice([1, 4, 8]) if seed % 2 else 4,
        step_tokens=rng.choice([16, 24, 64]),
        prefix_cache=bool(seed % 3),
        max_sequence_tokens=min(19, 64),
        jitter_seed=seed,
        automata=bool(seed % 2),
    )
    streams: list[Stream] = []
    for _ in range(30):
        task = rng.choice(["text", "text", "detect", "point"])
        sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(1 << 62))
        image = rng.choice([None, b"a", b"b"]) if sim.pool.total * sim.pool.page_tokens > 40 else None
        prompt = [20, *random_prompt(rng, rng.randint(0, 4))]
        streams.append(sim.submit(prompt, rng.randint(1, 5), image=image, task=task, sampling=sampling))
        for _ in range(rng.randint(0, 4)):
            sim.tick()
        if rng.random() < 0.2:
            sim.cancel(rng.choice(streams))
    sim.run()
    sim.check_at_rest()
    for stream in streams:
        if stream.rejected is None:
            check_stream(stream)
    assert any(s.finish and s.finish.reason is not FinishReason.CANCELLED for s in streams)


def test_zombie_row_is_skipped_and_its_pages_outlive_the_finish() -> None:
    sim = Simulation(depth=2)
    stream = sim.submit([20, 21], 8)
    while not stream.tokens:
        sim.tick()
    (seq,) = sim.scheduler.running
    sim.engine._plan_and_launch()
    assert seq.inflight_refs >= 1
    sim.cancel(stream)
    sim.engine.take_commands()
    assert stream.finish is not None and stream.finish.reason is FinishReason.CANCELLED
    assert seq.pages, "I5: pages stay while the row is in flight"
    sim.run()
    sim.check_at_rest()
    assert sim.engine.metrics.zombie_rows_total >= 1


def test_nan_ends_one_row_and_changes_no_other() -> None:
    sim = Simulation(depth=2)
    bad = sim.submit([20, NAN_TOKEN, 2, 30], 10)
    good = [sim.submit([20, 30 + i], 10) for i in range(3)]
    sim.run()
    sim.check_at_rest()
    assert bad.finish is not None and bad.finish.code is ErrorCode.NUMERICAL_ERROR
    assert len(bad.tokens) == 2
    for stream in good:
        check_stream(stream)


def test_preempted_sequences_resume_identically() -> None:
    sim = Simulation(depth=2, num_pages=12, page_tokens=2, max_rows=4, prefix_cache=False)
    streams = [sim.submit([20, 40 + i], 16, sampling=Sampling(temperature=1, seed=i)) for i in range(4)]
    sim.run()
    sim.check_at_rest()
    assert sim.scheduler.num_preemptions > 0
    for stream in streams:
        check_stream(stream)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    sim = Simulation(num_pages=5, page_tokens=4)
    stream = sim.submit(random_prompt(random.Random(0), 30), 4)
    sim.tick()
    assert stream.rejected is not None
    assert stream.rejected.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert "30 tokens" in stream.rejected.message and "15" in stream.rejected.message


def test_deadline_ends_a_sequence_with_its_own_reason() -> None:
    sim = Simulation()
    stream = sim.submit([20, 21], 100, deadline_s=0.01)
    sim.run()
    sim.check_at_rest()
    assert stream.finish is not None
    assert stream.finish.reason in (FinishReason.DEADLINE, FinishReason.STOP)


def test_repeated_picture_skips_its_prefill() -> None:
    sim = Simulation(page_tokens=2)
    first = sim.submit([20, 21, 22], 3, image=b"x", tenant="one")
    sim.run()
    second = sim.submit([20, 21, 23], 3, image=b"x", tenant="one")
    other = sim.submit([20, 21, 23], 3, image=b"y", tenant="one")
    stranger = sim.submit([20, 21, 23], 3, image=b"x", tenant="two")
    sim.run()
    sim.check_at_rest()
    for stream in (first, second, other, stranger):
        check_stream(stream)
    assert second.finish is not None and second.finish.cached_tokens == 10
    assert other.finish is not None and other.finish.cached_tokens == 0
    assert stranger.finish is not None and stranger.finish.cached_tokens == 0


def test_constrained_rows_do_not_hold_back_a_deeper_pipeline() -> None:
    sim = Simulation(depth=2)
    text = [sim.submit([20, 50 + i], 20) for i in range(2)]
    boxes = [sim.submit([20, 60 + i], 20, task="detect") for i in range(2)]
    sim.run()
    sim.check_at_rest()
    for stream in (*text, *boxes):
        check_stream(stream)
    assert len(boxes[0].values) == len(boxes[0].tokens)


def test_pages_of_generated_coordinates_are_not_found_by_their_ids() -> None:
    sim = Simulation(page_tokens=1)
    boxes = sim.submit([20, 41], 9, task="detect")
    sim.run()
    assert len(boxes.tokens) >= 3
    text = sim.submit([20, 41, *boxes.tokens, 50], 3)
    sim.run()
    sim.check_at_rest()
    check_stream(text)


def test_a_recording_shows_host_compute_and_copy_lanes_without_overlap() -> None:
    sim = Simulation(depth=2)
    sim.inbox.put(Received(GATEWAY, Trace(8)))
    sim.submit([20, 21], 20)
    sim.run()
    (trace,) = sim.outbox.traces
    events = json.loads(trace)["traceEvents"]
    assert {e["args"]["name"].split()[0] for e in events if e["ph"] == "M"} == {"host", "compute", "copy"}
    compute = [e for e in events if e["ph"] == "X" and e["tid"] == 2]
    assert len([e for e in compute if e["name"].startswith("step")]) == 8
    for one, two in itertools.pairwise(compute):
        assert two["ts"] >= one["ts"] + one["dur"] - 1e-3


def test_late_launch_takes_in_what_arrives_during_a_step() -> None:
    """The first token of a request that arrives mid-step comes as early as it would in blocking mode."""
    times: dict[tuple[int, bool], float] = {}
    for depth, late in ((1, False), (2, False), (2, True)):
        sim = Simulation(depth=depth, max_rows=8, late_launch=late, num_pages=400, max_sequence_tokens=1024)
        for i in range(4):
            sim.submit([20, 21, 30 + i], 400)
        while sim.engine.metrics.steps_total < 60:
            sim.tick()
        total = 0.0
        for i in range(10):
            arrived_s = sim.clock.now() + 0.0003
            sim.arrivals.append((arrived_s, ([25, 26, 40 + i], 2)))
            while not (sim.arrived and (sim.arrived[-1].tokens or sim.arrived[-1].finish)) or sim.arrivals:
                sim.tick()
            total += sim.clock.now() - arrived_s
            sim.arrived.clear()
        times[depth, late] = total / 10
    assert times[2, True] < times[2, False]
    assert times[2, True] < times[1, False] * 1.15


def test_preempted_boxes_resume_with_the_values_of_their_coordinates() -> None:
    sim = Simulation(depth=2, num_pages=12, page_tokens=2, max_rows=4, prefix_cache=False)
    streams = [sim.submit([20, 40 + i, 60 - i], 15, task="detect", max_objects=5) for i in range(8)]
    sim.run()
    sim.check_at_rest()
    assert sim.scheduler.num_preemptions > 0
    assert any(len(stream.tokens) > 6 for stream in streams)
    for stream in streams:
        check_stream(stream)


def test_pictures_are_encoded_one_at_a_time_while_others_decode() -> None:
    """A burst of pictures holds running streams for one picture's crops at most, and an idle device for more."""
    sim = Simulation(max_rows=8, num_pages=128, step_tokens=64, late_launch=False)
    sim.scheduler.limits = replace(sim.scheduler.limits, step_crops=6, mixed_crops=2)
    steps: list[tuple[bool, int]] = []
    launch = sim.runner.launch_forward

    def record(slot_number: int, plan: StepPlan, progress: Progress) -> None:
        crops = sum(p.num_crops for c in plan.chunks for p in c.seq.pictures if c.start <= p.position)
        steps.append((bool(plan.decode), crops))
        launch(slot_number, plan, progress)

    sim.runner.launch_forward = record  # type: ignore[method-assign]
    first = [sim.submit([30], 6, image=bytes([i])) for i in range(3)]
    sim.run()
    assert steps[0] == (False, 6), "nobody decodes: three pictures of two crops at once"
    steps.clear()
    running = sim.submit([30, 31], 20)
    while not running.tokens:
        sim.tick()
    late = [sim.submit([30], 6, image=bytes([10 + i])) for i in range(4)]
    sim.run()
    assert [crops for decodes, crops in steps if crops] == [2, 2, 2, 2]
    assert all(stream.finish is not None for stream in [*first, running, *late])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_prompt_that_finds_no_memory_is_shed_and_the_batch_goes_on(depth: int) -> None:
    sim = Simulation(depth=depth, num_slots=max(2, depth), max_rows=4)
    running = sim.submit([30, 31], 20)
    while not running.tokens:
        sim.tick()
    shed = sim.submit([30, OOM_TOKEN, 22], 8)
    sim.run()
    sim.check_at_rest()
    assert shed.finish is not None and shed.finish.code is ErrorCode.OUT_OF_MEMORY and not shed.tokens
    check_stream(running)
    again = sim.submit([30, 32, 22], 8)
    sim.run()
    check_stream(again)
