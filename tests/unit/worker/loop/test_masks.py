"""Masks of host-constrained rows: built together, alone or ahead, they are the same, and a slow one holds nobody."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Grammar, Sampling
from tests.unit.worker.constraints.spatial_grammar import SpatialGrammar
from tests.unit.worker.loop.simulation import Simulation, Stream
from worker.constraints.constraint import Constraint
from worker.constraints.llg import LlgConstraint, Vocabulary, compile_llg
from worker.loop.inbox import MaskReady
from worker.loop.masks import SLOW_S, MaskFiller
from worker.schedule.sequence import Sequence
from worker.sim.runner import fake_card
from worker.sim.tokenizer import FIRST_BYTE_ID, SIM_TOKENIZER, VOCAB_SIZE

CARD = fake_card(vocab_size=VOCAB_SIZE)
VOCABULARY = Vocabulary(SIM_TOKENIZER, VOCAB_SIZE, [0])
NUM_WORDS = -(-VOCAB_SIZE // 32)
LETTERS = Grammar("regex", "[a-f]{3,20}")


def allowed(constraint: Constraint) -> list[int]:
    words = np.zeros(NUM_WORDS, np.int32)
    constraint.fill_mask(words)
    ids: list[int] = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    return ids


def sequence(constraint: Constraint) -> Sequence:
    return Sequence(b"g", 0, "r", [1], 1, 9, Sampling(), frozenset(), 0.0, constraint=constraint)


def nobody(ready: MaskReady) -> None:
    raise AssertionError("nothing was asked for ahead")


@pytest.mark.parametrize("num_threads", [1, 4])
def test_masks_of_a_batch_equal_masks_alone(num_threads: int) -> None:
    rng = random.Random(5)
    constraints: list[Constraint] = []
    sources = [Grammar("regex", r"\d+"), Grammar("json_object", ""), Grammar("choice", '["x","yz"]')]
    for number in range(12):
        constraint: Constraint = compile_llg(sources[number % 3], VOCABULARY)
        for _ in range(number % 4):
            constraint.advance(rng.choice(allowed(constraint)))
        constraints.append(constraint)
    constraints[5] = SpatialGrammar(coord_id=5, size_id=6, end_id=0, with_size=True, max_objects=2)
    masks = np.full((16, NUM_WORDS), 7, np.int32)
    rows = [(15 - i, sequence(constraint)) for i, constraint in enumerate(constraints)]
    assert MaskFiller(nobody, num_threads=num_threads).fill(masks, rows) == []
    for row, seq in rows:
        assert seq.constraint is not None
        alone = np.zeros(NUM_WORDS, np.int32)
        seq.constraint.fill_mask(alone)
        assert (masks[row] == alone).all()
    assert (masks[:4] == 7).all(), "rows of others were touched"


@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_failed_matcher_is_reported_with_its_row(num_rows: int, num_threads: int) -> None:
    constraints = [compile_llg(Grammar("regex", "ab"), VOCABULARY) for _ in range(num_rows)]
    with pytest.raises(ValueError):
        constraints[-1].advance(FIRST_BYTE_ID + ord("x"))
    masks = np.zeros((num_rows, NUM_WORDS), np.int32)
    rows = [(i, sequence(constraint)) for i, constraint in enumerate(constraints)]
    failed = MaskFiller(nobody, num_threads=num_threads).fill(masks, rows)
    assert [row for row, _ in failed] == [num_rows - 1] and failed[0][1]


class HeldJobs(Executor):
    """Runs what it was given when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """`args` are a sequence and its mask: from here on its constraint is the thread's."""
        constraint = args[0].constraint
        constraint.is_lent = True

        def job() -> None:
            constraint.is_lent = False
            fn(*args, **kwargs)

        self.jobs.append(job)
        return Future()

    def run(self) -> None:
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job()


class SlowConstraint:
    """A matcher whose masks take the time they are told to, by a clock of their own."""

    def __init__(self, inner: LlgConstraint, clock: list[float], take_s: float) -> None:
        self.inner = inner
        self.clock = clock
        self.take_s = take_s
        self.error = ""
        self.num_masks = 0
        self.is_lent = False

    def fill_mask(self, words: Any) -> None:
        assert not self.is_lent, "two threads at one matcher"
        self.clock[0] += self.take_s
        self.num_masks += 1
        if self.error:
            raise ValueError(self.error)
        self.inner.fill_mask(words)

    def advance(self, token_id: int) -> None:
        self.inner.advance(token_id)

    def is_complete(self) -> bool:
        return self.inner.is_complete()


class Bench:
    """A simulated worker whose mask threads work when told."""

    def __init__(self, **options: Any) -> None:
        self.clock = [0.0]
        self.jobs = HeldJobs()
        masks = MaskFiller(self._on_ready, num_threads=1, clock=lambda: self.clock[0], threads=self.jobs)
        options = {"max_rows": 6, "num_pages": 128, **options}
        self.sim = Simulation(card=CARD, masks=masks, automata=False, **options)

    def _on_ready(self, ready: MaskReady) -> None:
        self.sim.inbox.put(ready)

    def submit_slow(
        self, number: int, max_tokens: int, take_s: float = 5 * SLOW_S
    ) -> tuple[Stream, SlowConstraint]:
        constraint = SlowConstraint(compile_llg(LETTERS, VOCABULARY), self.clock, take_s)
        stream = self.sim.submit([40 + number, 41], max_tokens, grammar=LETTERS, constraint=constraint)
        return stream, constraint

    def run(self, rng: random.Random | None = None, chance: float = 1.0) -> None:
        """Tick until everything has ended; the mask threads work at some of the ticks."""
        for _ in range(5000):
            if rng is None or rng.random() < chance:
                self.jobs.run()
            if not self.sim.tick() and self.sim.inbox.empty() and not self.jobs.jobs:
                break
        self.sim.check_at_rest()


def expected_tokens(number: int, max_tokens: int) -> list[int]:
    bench = Bench()
    stream, _ = bench.submit_slow(number, max_tokens, take_s=0.0)
    bench.run()
    return stream.tokens


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_slow_mask_holds_only_its_own_row(depth: int) -> None:
    bench = Bench(depth=depth, num_slots=max(2, depth))
    slow, constraint = bench.submit_slow(1, 12)
    quick, _ = bench.submit_slow(2, 30, take_s=0.0)
    plain = bench.sim.submit([30, 31], 30)
    while plain.finish is None:
        bench.sim.tick()
    assert quick.finish is not None, "a quick row waited for a slow one's mask"
    assert constraint.num_masks == 1 and slow.finish is None, (
        "the slow row's second mask was built inside a step"
    )
    bench.run()
    assert slow.tokens == expected_tokens(1, 12)
    assert constraint.num_masks - len(slow.tokens) in (0, 1), "a mask was built twice"


def test_a_mask_that_is_quick_again_is_built_with_its_step() -> None:
    bench = Bench()
    slow, constraint = bench.submit_slow(1, 12)
    while not bench.jobs.jobs:
        bench.sim.tick()
    constraint.take_s = 0.0
    bench.jobs.run()
    while slow.finish is None:
        bench.sim.tick()  # without the threads' help
    assert slow.tokens == expected_tokens(1, 12)
    bench.run()


def test_a_grammar_that_fails_on_the_thread_ends_its_own_row() -> None:
    bench = Bench()
    slow, constraint = bench.submit_slow(1, 12)
    plain = bench.sim.submit([30, 31], 12)
    while not bench.jobs.jobs:
        bench.sim.tick()
    constraint.error = "too many items"
    bench.run()
    assert slow.finish is not None and slow.finish.code is ErrorCode.INVALID_GRAMMAR
    assert "too many items" in slow.finish.message
    assert plain.finish is not None and plain.finish.reason is not FinishReason.ERROR


def test_cancelled_while_its_mask_is_built() -> None:
    bench = Bench()
    slow, _ = bench.submit_slow(1, 12)
    while not bench.jobs.jobs:
        bench.sim.tick()
    bench.sim.cancel(slow)
    bench.sim.tick()
    assert slow.finish is not None and slow.finish.reason is FinishReason.CANCELLED
    bench.run()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_pacing_changes_no_tokens_whenever_masks_arrive(seed: int, depth: int) -> None:
    """Random slowness, random arrival of masks, pages so few that paced rows are preempted and resumed."""
    rng = random.Random(seed)
    bench = Bench(depth=depth, num_slots=max(2, depth), num_pages=18, page_tokens=2, max_rows=5)
    streams = []
    for number in range(7):
        take_s = rng.choice([0.0, 0.0, 0.6 * SLOW_S, 3 * SLOW_S])
        streams.append((number, *bench.submit_slow(number, 14, take_s)))
    plain = [bench.sim.submit([30, 20 + i], 14) for i in range(2)]
    bench.run(rng, chance=0.3)
    assert bench.sim.scheduler.num_preemptions > 0, "the test preempts nothing"
    for number, stream, _ in streams:
        assert stream.tokens == expected_tokens(number, 14)
    assert all(s.finish is not None and s.finish.reason is not FinishReason.ERROR for s in plain)
