"""The engine on the GPU: graphs, depth, kernels and cancels change no token of anybody else."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import pytest
import torch

from loadtest.random_models import random_model
from shared.protocol import (
    Cancel,
    FromWorker,
    Sampling,
    StepOutputs,
    Submit,
    pack_i32,
    unpack_i32,
    unpack_i64,
)
from worker.device.cuda import CudaDevice
from worker.engine import Command, Engine
from worker.models.dense import Dense
from worker.models.moondream import Moondream
from worker.pages import PagePool
from worker.prefix_cache import PrefixCache
from worker.scheduler import Scheduler, SchedulerLimits
from worker.torch_runner import TorchRunner

GATEWAY, EPOCH, PAGE_TOKENS, MAX_ROWS = b"test", 1, 16, 8


class Tokens:
    """An outbox that keeps every sequence's tokens and finish reason."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        assert isinstance(message, StepOutputs), message
        for sequence_id, token_id in zip(
            unpack_i64(message.sequence_ids), unpack_i32(message.token_ids), strict=True
        ):
            self.tokens.setdefault(sequence_id, []).append(token_id)
        for finish in message.finishes:
            assert finish.sequence_id not in self.ends, "one terminal event (I11)"
            self.ends[finish.sequence_id] = str(finish.reason)

    def broadcast(self, message: FromWorker) -> None:
        pass


@pytest.fixture(scope="module", params=["tiny-moondream", "tiny-qwen3"])
def runner(request: pytest.FixtureRequest) -> Iterator[TorchRunner]:
    device = CudaDevice()
    with torch.inference_mode():
        model = random_model(request.param, device.torch_device, torch.float32).model
        made = TorchRunner(
            model,
            device,
            num_slots=2,
            num_pages=400,
            page_tokens=PAGE_TOKENS,
            max_rows=MAX_ROWS,
            max_sequence_tokens=model.card.context_tokens,
            step_tokens=256,
        )
        made.capture_graphs()
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
) -> Tokens:
    """Everything at once; `cancels`: sequence ids by the tick at which they are cancelled."""
    pool = PagePool(400, PAGE_TOKENS)
    limits = SchedulerLimits(
        max_rows=rows,
        step_tokens=256,
        mixed_tokens=128,
        max_sequence_tokens=runner.model.card.context_tokens,
    )
    inbox: SimpleQueue[Command] = SimpleQueue()
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
        inbox.put((GATEWAY, submit, []))
    tick = 0
    while engine.tick():
        tick += 1
        if cancels and tick in cancels:
            inbox.put((GATEWAY, Cancel(EPOCH, [cancels[tick]]), []))
    assert not engine.scheduler.has_work
    return outbox


@pytest.mark.parametrize("seed", range(3))
def test_pipelined_equals_blocking(runner: TorchRunner, seed: int) -> None:
    submits = requests(runner, 24, seed)
    blocking, pipelined = run(runner, submits, 1), run(runner, submits, 2)
    assert blocking.tokens == pipelined.tokens
    assert set(blocking.ends.values()) == {"length"}


def test_batched_equals_alone(runner: TorchRunner) -> None:
    """fp32 on the GPU: products of different batch sizes may round apart, so a rare token may differ."""
    submits = requests(runner, 16, 7)
    together = run(runner, submits, 2).tokens
    alone = run(runner, submits, 2, rows=1).tokens
    same = sum(together[i] == alone[i] for i in together)
    assert same >= 15, f"{same} of 16 sequences agree"


@contextmanager
def eager(runner: TorchRunner) -> Iterator[None]:
    """Run without graphs for a while. Graphs write to the slots' buffers, which an eager step replaces."""
    kept = [(slot.logits, slot.hidden) for slot in runner.slots]
    buckets = runner.buckets
    runner.device.captures, runner.buckets = False, []
    try:
        yield
    finally:
        runner.device.synchronize()
        runner.device.captures, runner.buckets = True, buckets
        for slot, (logits, hidden) in zip(runner.slots, kept, strict=True):
            slot.logits, slot.hidden = logits, hidden


def test_graphs_equal_eager(runner: TorchRunner) -> None:
    submits = requests(runner, 12, 3)
    captured = run(runner, submits, 2).tokens
    with eager(runner):
        found = run(runner, submits, 2).tokens
    same = sum(captured[i] == found[i] for i in captured)
    assert same >= 11, f"{same} of 12 sequences agree"  # padding changes which product runs, so rounding


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
