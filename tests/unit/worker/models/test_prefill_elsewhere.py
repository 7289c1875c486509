"""Prompts whose pages another process computed: the same tokens as one worker's, of layers that attend and that convolve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.protocol import (
    FromWorker,
    Pages,
    Prefill,
    PrefillAt,
    Sampling,
    StepOutputs,
    Submit,
    pack_i32,
)
from tests.unit.worker.loop.simulation import EPOCH
from tests.unit.worker.models.dense_oracle import draw, load, write
from tests.unit.worker.step.test_torch_runner import Harness
from worker.loop.inbox import PagesHere, PrefillEnded, PrefillJob, Received
from worker.models.contract import Model

WORKER = b"another worker"
LENGTHS = (16, 17, 31, 32, 33, 70)


class Direct:
    """Two workers without a wire: one asks, what the other says comes to its inbox."""

    def __init__(self, model: Model, *, mixed_tokens: int = 1600) -> None:
        self.asks = Harness(model, depth=2, prefills=self, mixed_tokens=mixed_tokens)
        self.gives = Harness(model, depth=2, pages_to=self, mixed_tokens=mixed_tokens)
        self.num_messages = 0

    def ask(self, job: PrefillJob) -> None:
        message = Prefill(EPOCH, job.job_id, job.prompt, job.first_page, job.tenant)
        self.gives.inbox.put(Received(WORKER, message))

    def cancel(self, job_id: int) -> None:
        raise AssertionError("everything comes")

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        assert gateway == WORKER
        if isinstance(message, Pages):
            self.num_messages += 1
            self.asks.inbox.put(PagesHere(message.job_id, message.first, message.keys, (payloads or [])[0]))
        elif isinstance(message, StepOutputs):
            for finish in message.finishes:
                self.asks.inbox.put(PrefillEnded(finish.sequence_id, "done"))

    def broadcast(self, message: FromWorker) -> None:
        pass

    def answer(self, submits: list[Submit]) -> list[list[int]]:
        streams = self.asks.begin([(submit, []) for submit in submits])
        for _ in range(10_000):
            if all(stream.finish is not None for stream in streams):
                break
            self.gives.engine.tick()
            self.asks.engine.tick()
        return [stream.tokens for stream in streams]


def submit(number: int, ids: list[int], temperature: float = 0.0) -> Submit:
    sampling = Sampling(temperature=temperature, seed=number)
    at = PrefillAt("p", 1)
    return Submit(EPOCH, number, str(number), pack_i32(ids), 12, sampling, ignore_eos=True, prefill_at=at)


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "lfm2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Layers of one kind, with windows, and with states; the first with pages in bf16 where attention reads those."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.set_num_threads(1)
    write(folder, request.param)
    with torch.inference_mode():
        made = load(folder)
    if request.param == "qwen3" and torch.bfloat16 in made.kv_dtypes:
        made.kv_dtype = torch.bfloat16
    return made


def test_the_same_tokens_as_one_worker(model: Model) -> None:
    prompts = [draw(length, length) for length in LENGTHS]
    prompts += [
        prompts[-1] + draw(40, 3),
        prompts[-1][:40] + draw(9, 4),
    ]  # what the caches of both have is shared
    for temperature, mixed_tokens in ((0.0, 1600), (0.9, 40)):
        submits = [submit(number, ids, temperature) for number, ids in enumerate(prompts)]
        alone = [stream.tokens for stream in Harness(model, depth=2).answer([(one, []) for one in submits])]
        pair = Direct(model, mixed_tokens=mixed_tokens)
        assert pair.answer(submits[:6]) == alone[:6]
        assert pair.answer(submits[6:]) == alone[6:]
        metrics = pair.asks.engine.metrics
        assert metrics.prefills_total == {"asked": 7, "done": 7}
        assert metrics.given_pages_total == 0 + 1 + 1 + 1 + 2 + 4 + 2 + 1
        assert pair.num_messages >= 7


def test_a_page_there_and_back(model: Model) -> None:
    harness = Harness(model, depth=1, num_pages=8)
    parts = [*harness.runner.cache.keys, *harness.runner.cache.values, *harness.runner.cache.states]
    for number, part in enumerate(parts):
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(number)))
    wanted = [part[torch.tensor([5, 2])].clone() for part in parts]
    data = harness.store.read([5, 2])
    assert len(data) == 2 * harness.store.format.page_bytes
    harness.store.write([3, 7], memoryview(data))
    for part, before in zip(parts, wanted, strict=True):
        assert torch.equal(part[torch.tensor([3, 7])], before)
