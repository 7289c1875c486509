"""Log-probabilities of prompts: those of transformers, however the prompt is cut, whatever is cached and runs beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import FinishReason
from shared.protocol import Sampling, Submit, pack_i32, unpack_i32
from tests.unit.worker.loop.simulation import CARD, EPOCH, GATEWAY, Simulation, Stream
from tests.unit.worker.loop.test_dense_engine import pair as pair  # a fixture
from tests.unit.worker.step.graph_device import GraphDevice
from tests.unit.worker.step.test_torch_runner import Harness
from worker.device.contract import Device
from worker.formats.open_source import open_source
from worker.models.contract import Model
from worker.models.registry import load_model
from worker.schedule.intake import build_sequence
from worker.schedule.plan import Chunk, PromptScores, StepPlan, StepResult, take_scores
from worker.step import prompt_scores

RNG = random.Random(5)
PROMPT = [1, *(RNG.randrange(4, 160) for _ in range(118))]


def submit(
    number: int, prompt: list[int], max_tokens: int, num_scores: int = -1
) -> tuple[Submit, list[bytes]]:
    sampling = Sampling(num_prompt_logprobs=num_scores)
    return Submit(EPOCH, number, str(number), pack_i32(prompt), max_tokens, sampling, ignore_eos=True), []


def check(stream: Stream, oracle: Any, num_top: int) -> None:
    """The stream's scores are the oracle's."""
    prompt = unpack_i32(stream.submit.prompt).tolist()
    with torch.inference_mode():
        wanted = oracle(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    assert len(stream.scores) == len(prompt) - 1
    for place, (logprob, rank, top_ids, top) in enumerate(stream.scores):
        row = wanted[place]
        own = row[prompt[place + 1]]
        assert abs(logprob - float(own)) <= 1e-4
        assert rank == int((row > own).sum()) + 1
        assert len(top_ids) == len(top) == num_top
        np.testing.assert_allclose(top, row.topk(num_top).values if num_top else [], atol=1e-4)
        np.testing.assert_allclose(row[top_ids], top, atol=1e-4)


@pytest.fixture(params=["eager", "captured"])
def harnessed(
    request: pytest.FixtureRequest, pair: tuple[Model, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Model, Any, Device | None]:
    """A model, its oracle, and where it runs; captured, it runs without the operations that no recording would show."""
    model, oracle = pair
    if request.param == "eager":
        return model, oracle, None
    monkeypatch.setattr("worker.native.library.load", lambda: None)
    oracle.save_pretrained(tmp_path)
    with torch.inference_mode():
        plain = load_model(open_source(tmp_path), torch.device("cpu"), torch.float32, lambda *_: None)
    return plain, oracle, GraphDevice()


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 3])
def test_scores_equal_transformers(
    harnessed: tuple[Model, Any, Device | None], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, oracle, device = harnessed
    monkeypatch.setattr(prompt_scores, "SLICE_BYTES", 4 * 160 * 7)  # 7 positions at a time
    harness = Harness(model, depth=depth, mixed_tokens=20, device=device, num_pages=40)
    (before,) = harness.answer([submit(0, PROMPT, 3)])  # its pages are remembered
    others = [submit(1, PROMPT[:30], 60), submit(2, PROMPT[:50], 40, 0)]
    scored = [submit(3, PROMPT, 4, 5), submit(4, PROMPT[:64], 1, 20)]
    streams = harness.answer([*others, *scored])
    assert streams[0].scores == [] and streams[0].finish is not None
    assert streams[0].finish.reason is FinishReason.LENGTH
    for stream, num_top in zip(streams[1:], (0, 5, 20), strict=True):
        check(stream, oracle, num_top)
    assert before.scores == [] and streams[2].tokens[:3] == before.tokens
    (after,) = harness.answer([submit(5, PROMPT, 4)])
    assert after.finish is not None and after.finish.cached_tokens > 0
    assert after.tokens == streams[2].tokens


def test_a_prompt_that_is_preempted_is_scored_once() -> None:
    """The outbox looks at every message: no score comes twice, none is left out."""
    prompts = [[20 + (7 * i + j) % 60 for j in range(30)] for i in range(4)]
    wanted = []
    for i, prompt in enumerate(prompts):
        one = Simulation(step_tokens=64)
        wanted.append(one.submit(prompt, 24, sampling=Sampling(num_prompt_logprobs=i % 3)))
        one.run()
    crowd = Simulation(num_pages=30, step_tokens=12)
    streams = [
        crowd.submit(prompt, 24, sampling=Sampling(num_prompt_logprobs=i % 3))
        for i, prompt in enumerate(prompts)
    ]
    crowd.run()
    crowd.check_at_rest()
    assert crowd.scheduler.num_preemptions > 0
    for stream, alone in zip(streams, wanted, strict=True):
        assert len(stream.scores) == 29
        assert (stream.scores, stream.tokens) == (alone.scores, alone.tokens)


def test_scores_known_before_a_preemption_are_not_sent_again() -> None:
    seq = build_sequence(GATEWAY, submit(0, list(range(20, 29)), 1, 1)[0], [], CARD, 0.0)
    packed = [np.arange(4, dtype=kind).tobytes() for kind in (np.float32, np.int32, np.int32, np.float32)]
    first = Chunk(seq, 0, 4, False, 4)
    again = Chunk(seq, 2, 4, False, 4)  # cut elsewhere
    for chunk, at, left in ((first, 1, 4), (again, 5, 2), (first, 0, 0)):
        plan = StepPlan(1, [], [], [chunk], [], [], [], [], [])
        taken = take_scores(plan, StepResult([], [], scores=[PromptScores(*packed)]))
        if not left:
            assert taken == []
            continue
        ((_, begins, scores),) = taken
        assert begins == at
        assert [
            len(part) for part in (scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
        ] == [4 * left] * 4
        assert np.frombuffer(scores.top_ids, np.int32).tolist() == [0, 1, 2, 3][4 - left :]
