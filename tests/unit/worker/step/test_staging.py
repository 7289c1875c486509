"""What a slot's buffer says of a step is the same whatever it held before."""

from __future__ import annotations

import random

import numpy as np

from shared.protocol import Sampling
from worker.schedule.plan import Chunk, StepPlan
from worker.schedule.rng import uniform, uniforms
from worker.schedule.sequence import Sequence
from worker.step.staging import StepShape, Views, stage_chunks, stage_padding, stage_rows, used_words

SHAPE = StepShape(
    max_rows=20, max_sequence_tokens=24, step_tokens=32, page_tokens=4, num_pages=120, vocab_size=97
)


def fresh() -> Views:
    return Views(np.full(SHAPE.num_words, -7, np.int32), SHAPE)


def sequence(number: int, rng: random.Random) -> Sequence:
    sampling = Sampling(temperature=rng.choice([0.0, 0.8]), seed=rng.getrandbits(64), top_k=rng.randrange(5))
    task = rng.choice(["text", "detect"])
    seq = Sequence(b"g", number, "r", [1] * 3, 3, 40, sampling, frozenset(), 0.0, task=task)
    seq.pages = [rng.randrange(1, 99)]
    return seq


def step_of(decode: list[Sequence], chunks: list[Chunk], rng: random.Random) -> StepPlan:
    positions = [min(seq.num_computed, 23) for seq in decode]
    samples = [*decode, *(chunk.seq for chunk in chunks)]
    indexes = [rng.randrange(100) for _ in samples]
    return StepPlan(1, decode, positions, chunks, samples, indexes, [], [], [])


def stage(views: Views, plan: StepPlan, padded: int) -> None:
    stage_rows(views, plan)
    if plan.chunks:
        stage_chunks(views, plan)
    else:
        stage_padding(views, len(plan.decode), padded)


def test_a_used_buffer_shows_what_a_fresh_one_would() -> None:
    """Rows come, go, move, grow, are resumed in other rows with other pages; chunks and padding lie between."""
    for seed in range(30):
        rng = random.Random(seed)
        used = fresh()
        live = [sequence(number, rng) for number in range(18)]
        for row, seq in enumerate(live):
            seq.row = row
        decode = live[:5]
        for _ in range(40):
            event = rng.randrange(8)
            if event == 0:
                decode = rng.sample(live, rng.randrange(1, 18))
            elif event == 1 and len(decode) > 1:
                a, b = rng.sample(decode, 2)
                a.row, b.row = b.row, a.row
            elif event == 2:
                victim = rng.choice(decode)
                victim.pages = [rng.randrange(1, 99) for _ in victim.pages]
            for seq in decode:
                seq.num_computed = (seq.num_computed + 1) % 20
                while len(seq.pages) * 4 <= seq.num_computed:
                    seq.pages.append(rng.randrange(1, 99))
            others = [seq for seq in live if seq not in decode]
            chunks = [Chunk(others[0], 0, 3, True)] if event == 3 and others else []
            plan = step_of(decode, chunks, rng)
            padded = min(20, len(decode) + rng.randrange(3))
            stage(used, plan, padded)
            expected = fresh()
            stage(expected, plan, padded)
            # Where the fresh buffer was not written, nothing is read.
            written = expected.buffer[: used_words(plan, SHAPE, padded)] != -7
            same = used.buffer[: len(written)] == expected.buffer[: len(written)]
            assert same[written].all(), (seed, np.flatnonzero(written & ~same))


def test_many_draws_equal_single_ones() -> None:
    rng = random.Random(3)
    seeds = [rng.getrandbits(64) for _ in range(200)] + [0, (1 << 64) - 1, -1]
    indexes = [rng.randrange(1 << 20) for _ in seeds]
    assert uniforms(seeds, indexes) == [uniform(s, i) for s, i in zip(seeds, indexes, strict=True)]
    assert uniforms(seeds[:3], indexes[:3]) == [
        uniform(s, i) for s, i in zip(seeds[:3], indexes[:3], strict=True)
    ]
