"""The engine on the GPU: graphs, depth, kernels and cancels change no token of anybody else."""

from __future__ import annotations

import gc
import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue

import msgspec
import numpy as np
import pytest
import torch

from loadtest.gpu.random_models import random_model
from shared.protocol import (
    Cancel,
    FromWorker,
    Sampling,
    StepOutputs,
    Submit,
    ThinkingBudget,
    pack_i32,
    unpack_i32,
    unpack_i64,
)
from tests.two_sheets import image_input
from worker.device.choices import flipped, names
from worker.device.contract import Device
from worker.device.cuda import CudaDevice
from worker.loop.engine import Engine
from worker.loop.inbox import Inbox, Received
from worker.models.contract import Model
from worker.models.dense import Dense
from worker.models.moondream import Moondream
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pages import PagePool
from worker.schedule.plan import Chunk
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.scheduler import Scheduler
from worker.step.chunk_graphs import ChunkGraphs
from worker.step.slot import Slot
from worker.step.staging import StepShape
from worker.step.torch_runner import TorchRunner
from worker.step.warm_up import warm_up

GATEWAY, EPOCH, PAGE_TOKENS, MAX_ROWS = b"test", 1, 16, 8


class Tokens:
    """An outbox that keeps every sequence's tokens and finish reason."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.scores: dict[int, list[float]] = {}  # of prompts

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        assert isinstance(message, StepOutputs), message
        for sequence_id, token_id in zip(
            unpack_i64(message.sequence_ids), unpack_i32(message.token_ids), strict=True
        ):
            self.tokens.setdefault(sequence_id, []).append(token_id)
        for item in message.prompt_logprobs:
            self.scores.setdefault(item.sequence_id, []).extend(
                np.frombuffer(item.logprobs, np.float32).tolist()
            )
        for finish in message.finishes:
            assert finish.sequence_id not in self.ends, "one terminal event (I11)"
            self.ends[finish.sequence_id] = str(finish.reason)

    def broadcast(self, message: FromWorker) -> None:
        pass


def make_runner(model: Model, device: Device) -> TorchRunner:
    return TorchRunner(
        model,
        device,
        StepShape(
            max_rows=MAX_ROWS,
            max_sequence_tokens=model.card.context_tokens,
            step_tokens=256,
            page_tokens=PAGE_TOKENS,
            num_pages=400,
            vocab_size=model.card.vocab_size,
        ),
    )


@pytest.fixture(scope="module", params=["tiny-moondream", "tiny-qwen3"])
def runner(request: pytest.FixtureRequest) -> Iterator[TorchRunner]:
    device = CudaDevice()
    with torch.inference_mode():
        model = random_model(request.param, device.torch_device, torch.float32).model
        made = make_runner(model, device)
    assert warm_up(made) == 0
    assert "failed" not in made.graph_counts.captures_total, "every graph is captured"
    yield made


def requests(runner: TorchRunner, num: int, seed: int) -> list[Submit]:
    rng = random.Random(seed)
    vocab = runner.model.card.vocab_size
    made = []
    for sequence_id in range(num):
        sampling = (
            Sampling() if rng.random() < 0.5 else Sampling(temperature=0.8, top_p=0.9, seed=sequence_id)
        )
        prompt = [rng.randrange(8, vocab) for _ in range(rng.randint(1, 60))]
        made.append(
            Submit(
                EPOCH,
                sequence_id,
                str(sequence_id),
                pack_i32(prompt),
                rng.randint(1, 40),
                sampling=sampling,
                ignore_eos=True,
            )
        )
    return made


def run(
    runner: TorchRunner,
    submits: list[Submit],
    depth: int,
    *,
    rows: int = MAX_ROWS,
    cancels: dict[int, int] | None = None,
    frames: dict[int, list[bytes]] | None = None,
) -> Tokens:
    """Everything at once; `cancels`: sequence ids by the tick at which they are cancelled; `frames`: pixels by id."""
    pool = PagePool(400, PAGE_TOKENS)
    limits = SchedulerLimits(
        max_rows=rows,
        step_tokens=256,
        mixed_tokens=128,
        max_sequence_tokens=runner.model.card.context_tokens,
    )
    inbox: Inbox = SimpleQueue()
    outbox = Tokens()
    engine = Engine(
        Scheduler(limits, pool, PrefixCache(pool)),
        runner,
        runner.model.card,
        inbox=inbox,
        outbox=outbox,
        clock=time.perf_counter,
        epoch=EPOCH,
        depth=depth,
    )
    for submit in submits:
        inbox.put(Received(GATEWAY, submit, (frames or {}).get(submit.sequence_id, [])))
    tick = 0
    while engine.tick():
        tick += 1
        if cancels and tick in cancels:
            inbox.put(Received(GATEWAY, Cancel(EPOCH, [cancels[tick]])))
    assert not engine.scheduler.has_work
    return outbox


@pytest.mark.parametrize("seed", range(3))
def test_pipelined_equals_blocking(runner: TorchRunner, seed: int) -> None:
    submits = requests(runner, 24, seed)
    blocking, pipelined = run(runner, submits, 1), run(runner, submits, 2)
    assert blocking.tokens == pipelined.tokens
    assert set(blocking.ends.values()) == {"length"}


def test_prompts_are_scored_and_thoughts_bound_beside_others(runner: TorchRunner) -> None:
    """Scores are those of the model's own logits, by whole prompts; a forced mark changes nobody else's tokens."""
    submits = requests(runner, 8, 5)
    plain = run(runner, submits, 2)
    scoring = Sampling(num_prompt_logprobs=3)
    asked = [
        msgspec.structs.replace(one, sampling=scoring) if i % 2 else one for i, one in enumerate(submits)
    ]
    thinker = Submit(
        EPOCH, 99, "99", pack_i32([9, 10, 11]), 20, ignore_eos=True, thinking=ThinkingBudget(5, [], [12, 13])
    )
    found = run(runner, [*asked, thinker], 2)
    again = run(runner, [*asked, thinker], 1)
    assert found.tokens[99][5:7] == [12, 13]
    assert found.tokens == again.tokens
    for i, one in enumerate(submits):
        num_prompt = len(one.prompt) // 4
        if i % 2 == 0:
            assert found.tokens[i] == plain.tokens[i]
        elif num_prompt > 1:
            assert len(found.scores[i]) == num_prompt - 1 and all(np.isfinite(found.scores[i]))
            np.testing.assert_allclose(found.scores[i], again.scores[i], atol=1e-3)


def test_batched_equals_alone(runner: TorchRunner) -> None:
    """fp32 on the GPU: products of different batch sizes may round apart, so a rare token may differ."""
    submits = requests(runner, 16, 7)
    together = run(runner, submits, 2).tokens
    alone = run(runner, submits, 2, rows=1).tokens
    same = sum(together[i] == alone[i] for i in together)
    assert same >= 15, f"{same} of 16 sequences agree"


@contextmanager
def eager(runner: TorchRunner) -> Iterator[None]:
    """Run the bodies of the graphs, not the graphs, for a while."""
    assert runner.graphs is not None and runner.chunk_graphs is not None
    runner.graphs.enabled = runner.chunk_graphs.enabled = False
    try:
        yield
    finally:
        runner.device.synchronize()
        runner.graphs.enabled = runner.chunk_graphs.enabled = True


def test_graphs_equal_eager(runner: TorchRunner) -> None:
    """The same kernels over the same padded rows: not a token may differ."""
    submits = requests(runner, 12, 3)
    captured = run(runner, submits, 1).tokens  # blocking: which rows meet in a step does not hang on timing
    with eager(runner):
        assert run(runner, submits, 1).tokens == captured


def test_captured_chunks_equal_eager_ones(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and pictures, new and cached, several a step and beside decode rows, over poisoned KV memory."""
    submits = requests(runner, 16, 13)
    submits += [msgspec.structs.replace(one, sequence_id=100 + i) for i, one in enumerate(submits[:4])]
    frames: dict[int, list[bytes]] = {}
    if runner.model.encoder is not None:
        pixels = random.Random(1).randbytes(70 * 70 * 3)
        for number in (1, 5, 9):
            image = image_input(1, 25, 70, hashlib.sha256(pixels).digest())
            submits[number] = msgspec.structs.replace(submits[number], images=[image])
            frames[submits[number].sequence_id] = [pixels, pixels]
    buckets: list[int] = []
    pad = ChunkGraphs.pad

    def watched(self: ChunkGraphs, slot: Slot, chunks: list[Chunk]) -> int:
        buckets.append(pad(self, slot, chunks))
        return buckets[-1]

    monkeypatch.setattr(ChunkGraphs, "pad", watched)
    with torch.inference_mode():
        for memory in (*runner.cache.keys, *runner.cache.values):
            memory.fill_(float("nan"))
    try:
        missed = dict(runner.graph_counts.eager_steps_total)
        captured = run(runner, submits, 1, frames=frames).tokens
        assert runner.graph_counts.eager_steps_total == missed and any(buckets)
        assert len(captured) == len(submits)
        with eager(runner):
            assert run(runner, submits, 1, frames=frames).tokens == captured
        assert runner.graph_counts.eager_steps_total["chunk"] > missed.get("chunk", 0)
        for memory in (*runner.cache.keys, *runner.cache.values):
            assert bool(memory[0, 0].isfinite().all()), "what padding wrote"
    finally:
        with torch.inference_mode():
            for memory in (*runner.cache.keys, *runner.cache.values):
                memory.nan_to_num_(0.0)


def test_rows_that_need_eager_sampling_beside_rows_that_do_not(runner: TorchRunner) -> None:
    submits = requests(runner, 9, 4)
    for number, sampling in enumerate(
        [
            Sampling(num_logprobs=3),
            Sampling(frequency_penalty=1.5, logit_bias={9: 3.0}),
            Sampling(min_tokens=4, suppress_ids=[11, 12]),
        ]
    ):
        submits[3 * number] = msgspec.structs.replace(submits[3 * number], sampling=sampling)
    blocking, pipelined = run(runner, submits, 1), run(runner, submits, 2)
    assert blocking.tokens == pipelined.tokens
    assert set(pipelined.ends.values()) == {"length"}


def test_a_late_capture_equals_one_at_start() -> None:
    """Nothing captured at start: each graph is recorded between steps in flight."""
    device = CudaDevice()
    with torch.inference_mode():
        model = random_model("tiny-moondream", device.torch_device, torch.float32).model
        late, early = (make_runner(model, device) for _ in range(2))
        early.capture_graphs()
    submits = requests(early, 20, 8)
    expected = run(early, submits, 2).tokens
    found = run(late, submits, 2).tokens
    same = sum(found[i] == expected[i] for i in expected)
    assert same >= 19, f"{same} of 20 sequences agree"  # timing decides which rows meet: rounding, as below
    counts = late.graph_counts
    assert counts.captures_total.get("late") and "failed" not in counts.captures_total


def _add_one(memory: torch.Tensor) -> None:
    memory.add_(1)


def test_graphs_are_captured_anew_after_all_others_are_gone(runner: TorchRunner) -> None:
    """A runner's graphs may all go while their device stays: its pools must still take new ones."""
    assert isinstance(runner.device, CudaDevice)
    for aside in (False, True, False, True):
        memory = torch.zeros(4, device=runner.device.torch_device)
        graph = runner.device.capture(partial(_add_one, memory), aside=aside)
        before = float(memory[0])
        with runner.device.compute.use():
            graph.replay()
        runner.device.synchronize()
        assert float(memory[0]) == before + 1
        del graph
    device = CudaDevice()
    for _ in range(2):
        with torch.inference_mode():
            made = make_runner(runner.model, device)
            made.capture_graphs()
        assert "failed" not in made.graph_counts.captures_total
        del made
        gc.collect()


def test_each_switch_turned_gives_the_same_tokens(runner: TorchRunner) -> None:
    """New runners over the same model, each with one switch turned: equal but for those that add in another order."""
    if not isinstance(runner.model, Moondream):
        pytest.skip("Moondream takes every switch")
    assert isinstance(runner.device, CudaDevice)
    submits = requests(runner, 8, 21)
    expected = run(runner, submits, 2).tokens
    for name in names():
        with flipped(name):
            with torch.inference_mode():
                made = make_runner(runner.model, runner.device)
            found = run(made, submits, 2).tokens
        same = sum(found[i] == expected[i] for i in expected)
        assert same >= 7, f"{name}: {same} of 8 sequences agree"


def test_random_cancels_leave_others_alone(runner: TorchRunner) -> None:
    rng = random.Random(11)
    submits = requests(runner, 40, 5)
    undisturbed = run(runner, submits, 2).tokens
    cancels = {rng.randrange(1, 60): rng.randrange(40) for _ in range(15)}
    disturbed = run(runner, submits, 2, cancels=cancels)
    assert len(disturbed.ends) == 40
    finished = [i for i, reason in disturbed.ends.items() if reason == "length"]
    assert len(finished) >= 25
    same = sum(disturbed.tokens[i] == undisturbed[i] for i in finished)
    assert same >= len(finished) - 1  # other neighbours, other batch sizes: rounding, as above


def test_kernels_equal_torch(runner: TorchRunner) -> None:
    """The same model without the fused kernels, eagerly: logits agree to fp32 rounding, so tokens nearly always."""
    submits = requests(runner, 12, 9)
    fused = run(runner, submits, 1).tokens
    model = runner.model
    assert isinstance(model, Moondream | Dense) and model.fuses
    with eager(runner):
        model.fuses = False
        try:
            plain = run(runner, submits, 1).tokens
        finally:
            model.fuses = True
    same = sum(fused[i] == plain[i] for i in fused)
    assert same >= 11, f"{same} of 12 sequences agree"
