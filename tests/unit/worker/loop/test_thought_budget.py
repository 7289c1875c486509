"""A thought's budget: counted exactly, the closing mark forced once, and nobody waits for it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.protocol import Sampling, Submit, ThinkingBudget, pack_i32
from tests.unit.worker.loop.simulation import CARD, EPOCH, GATEWAY, Simulation, Stream, expected
from tests.unit.worker.step.graph_device import GraphDevice
from tests.unit.worker.step.test_captured_steps import tiny as tiny  # a fixture
from tests.unit.worker.step.test_captured_steps import torch_alone as torch_alone
from tests.unit.worker.step.test_torch_runner import Harness
from worker.constraints.thought_budget import ThoughtBudget
from worker.models.moondream import Moondream
from worker.schedule.intake import build_sequence
from worker.schedule.refusal import Refusal

OPEN, CLOSE = [40], [50, 51]


def said(budget: int, opens: list[int], closes: list[int], tokens: Iterator[int], num: int) -> list[int]:
    """What is said when the model would say `tokens`, one by one: the definition, written as text."""
    out: list[int] = []
    begun = 0 if not opens else None
    closed = False
    while len(out) < num:
        used = None if begun is None or closed else len(out) - begun
        if used is not None and used >= budget:
            held = next(
                n for n in range(len(closes), -1, -1) if out[len(out) - n :] == closes[:n] and n <= used
            )
            out += closes[held:]
            closed = True
            continue
        out.append(next(tokens))
        if begun is None and out[-len(opens) :] == opens and len(out) - len(opens) < 8:
            begun = len(out)
        elif begun is not None and not closed and out[begun:][-len(closes) :] == closes:
            closed = True
    return out[:num]


@given(
    st.integers(0, 6),
    st.sampled_from([[], [1], [1, 2], [1, 1, 2]]),
    st.sampled_from([[3], [3, 4], [3, 3, 4], [3, 4, 3]]),
    st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=40, max_size=40),
    st.integers(1, 3),
)
def test_it_says_when_it_may_force(
    budget: int, opens: list[int], closes: list[int], model: list[int], lag: int
) -> None:
    constraint = ThoughtBudget(budget, opens, closes)
    planned: list[bool] = []  # of each token, as planned when `lag` tokens before it were uncommitted at most
    tokens, out = iter(model), []
    for index in range(24):
        while len(planned) < index + lag:
            planned.append(constraint.may_force(len(planned), index))
        words = np.zeros(1, np.int32)
        constraint.fill_mask(words)
        forced = [i for i in range(32) if int(words.view(np.uint32)[0]) >> i & 1]
        if len(forced) == 1:
            assert planned[index], "a token was forced that was not masked"
        token = forced[0] if len(forced) == 1 else next(tokens)
        out.append(token)
        constraint.advance(token)
    assert out == said(budget, opens, closes, iter(model), 24)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_the_pipelined_loop_keeps_it(depth: int, budget: int) -> None:
    sim = Simulation(depth=depth, num_slots=depth, step_tokens=40)
    others = [sim.submit([20 + i, 30, 31], 40) for i in range(2)]
    thinking = ThinkingBudget(budget, [], CLOSE)
    thinker = sim.submit([60, 61], 30, thinking=thinking, sampling=Sampling(temperature=1.0, seed=4))
    sim.run()
    sim.check_at_rest()
    assert thinker.tokens[budget : budget + 2] == CLOSE
    for stream in others:  # nobody else's tokens change
        assert (stream.tokens, stream.finish is not None) == (expected(stream.submit)[0], True)
    num_masked = sim.engine.metrics.sync_steps_total.get("mask", 0)
    assert num_masked <= len(CLOSE)  # only where the mark is forced does the loop wait for a commit


def test_preemption_and_an_early_end_keep_it() -> None:
    def ask(sim: Simulation) -> list[Stream]:
        rng = random.Random(2)
        return [
            sim.submit(
                [rng.randrange(20, 90) for _ in range(20)],
                40,
                thinking=ThinkingBudget(9, [], [55]),
                sampling=Sampling(temperature=1.0, seed=i),
            )
            for i in range(4)
        ]

    roomy, tight = Simulation(num_pages=200), Simulation(num_pages=32, depth=3, num_slots=3)
    streams = [ask(sim) for sim in (roomy, tight)]
    for sim in (roomy, tight):
        sim.run()
        sim.check_at_rest()
    assert tight.scheduler.num_preemptions > 0
    for one, other in zip(*streams, strict=True):
        assert one.tokens == other.tokens
        assert 55 in one.tokens[:10]


@pytest.mark.slow
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_the_real_runner_keeps_it(tiny: Moondream, captured: bool) -> None:
    prompt = pack_i32(list(range(4, 24)))
    device = GraphDevice() if captured else None
    harness = Harness(tiny, depth=2, device=device)
    if captured:
        harness.runner.capture_graphs()
    plain: list[tuple[Submit, list[bytes]]] = [
        (Submit(EPOCH, n, str(n), prompt, 24, ignore_eos=True), []) for n in range(2)
    ]
    thought = ThinkingBudget(6, [], CLOSE)
    bound: list[tuple[Submit, list[bytes]]] = [
        (Submit(EPOCH, 7, "7", prompt, 24, ignore_eos=True, thinking=thought), [])
    ]
    streams = harness.answer([*plain, *bound])
    (alone,) = Harness(tiny, depth=1, max_rows=1, cache=False, late=False).answer(
        [(Submit(EPOCH, 1, "1", prompt, 24, ignore_eos=True), [])]
    )
    assert streams[0].tokens == streams[1].tokens == alone.tokens
    assert streams[2].tokens[:8] == [*alone.tokens[:6], *CLOSE]
    assert len(streams[2].tokens) == 24


@pytest.mark.parametrize(
    "thinking",
    [
        ThinkingBudget(-1, [], [5]),
        ThinkingBudget(3, [], []),
        ThinkingBudget(3, [CARD.vocab_size], [5]),
        ThinkingBudget(3, [], [5] * 33),
    ],
)
def test_what_cannot_be_kept_is_refused(thinking: ThinkingBudget) -> None:
    message = Submit(EPOCH, 0, "0", pack_i32([20]), 5, thinking=thinking)
    with pytest.raises(Refusal, match=r"at least 0|marks have"):
        build_sequence(GATEWAY, message, [], CARD, 0.0)
