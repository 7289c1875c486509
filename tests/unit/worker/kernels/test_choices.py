"""Every switch of `worker.device.choices` computes the same with and without: equal bits, or equal up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from loadtest.gpu.devices import ReplayingCpuDevice
from loadtest.gpu.random_models import random_model
from tests.unit.worker.step.graph_device import GraphDevice
from worker.device.choices import GpuChoices, choices, flipped, is_on, names, switch, without
from worker.device.contract import Device
from worker.kernels import dependent
from worker.kernels.activation import gelu_tanh
from worker.kernels.few_rows_product import suits
from worker.kernels.rotary_kv_write import rotary_kv_write
from worker.models.linear import has_own_products
from worker.models.moondream import Moondream
from worker.step.decode_graphs import Flavour, bucket_sizes, least_bucket
from worker.step.staging import StepShape, stage_padding
from worker.step.torch_runner import TorchRunner

ROUNDS = {"one_product", "tail_norm", "own_products"}
"""Switches that add in another order; all others must not change a bit."""
OUTSIDE = {"upload_aside", "early_copy", "vision_stream", "vision_gelu", "dependent_launch"}
"""Switches of which an interpreted decode step sees nothing."""


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moondream]:
    """A small Moondream as on a GPU: weights unpacked and joined, forwards by kernels."""
    monkeypatch.setattr("worker.native.library.load", lambda: None)
    monkeypatch.setattr("worker.models.linear.can_pack", lambda *_: False)
    monkeypatch.setattr("worker.models.moondream.joins", lambda device: True)
    made = random_model("tiny-moondream", torch.device("cpu"), torch.float32).model
    assert isinstance(made, Moondream)
    made.fuses, made.looks = True, False
    yield made


def make_runner(model: Moondream, device: Device | None = None, tokens: int = 64) -> TorchRunner:
    shape = StepShape(3, tokens, 64, 16, 8, model.card.vocab_size, num_slots=1, step_crops=1)
    runner = TorchRunner(model, device or ReplayingCpuDevice(), shape, token_buckets=[])
    runner.sampler.use_kernels()
    return runner


def step(
    runner: TorchRunner, run: Callable[[], object] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One gated decode step over two rows with context and a padding row, one of them drawn: outputs, the next inputs,
    logits, keys. `run`: by this instead of eagerly."""
    slot = runner.slots[0]
    generator = torch.Generator().manual_seed(3)
    for memory in (*runner.cache.keys, *runner.cache.values):
        memory.copy_(torch.randn(memory.shape, generator=generator))
    runner.rows.last_ids.copy_(torch.tensor([17, 101, 9, 0]))
    stage_padding(slot.host, 0, 3)
    ints, floats = slot.host.ints, slot.host.floats
    for name in ("rows", "graph_rows", "sample_rows"):
        ints[name][:2] = [2, 0]
    ints["positions"][:2], ints["lengths"][:2] = [5, 20], [6, 21]
    slot.host.tables[0, 0], slot.host.tables[1, :2] = 3, [5, 2]
    ints["write_index"][:2] = [3 * 16 + 5, 2 * 16 + 4]
    floats["temperature"][:2], floats["top_p"][:2], floats["uniform"][:2] = (
        [0.0, 0.9],
        [1.0, 0.8],
        [0.5, 0.37],
    )
    floats["min_p"][:2] = 0
    slot.upload()
    slot.outputs.fill_(-1)
    if run is None:
        runner.forward.decode(slot, 3, Flavour.GATED)
    else:
        run()
    assert slot.logits is not None
    keys = torch.stack([memory[1:] for memory in runner.cache.keys])
    return slot.outputs[:2].clone(), runner.rows.last_ids[:3].clone(), slot.logits[:2].clone(), keys


@pytest.mark.slow
def test_each_switch_turned_gives_the_tokens_of_the_defaults(model: Moondream) -> None:
    expected = step(make_runner(model))
    assert expected[0][:, 0].tolist() == [expected[1][2], expected[1][0]] and expected[1][1] == 101
    for name in sorted(set(names()) - OUTSIDE - {"last_joins"}):  # that needs longer rows, below
        with flipped(name):
            assert getattr(choices(), name) is not is_on(name)
            found = step(make_runner(model))
        for one, other, what in zip(found, expected, ("outputs", "inputs", "logits", "keys"), strict=True):
            if name in ROUNDS and one.is_floating_point():
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(one, other), (name, what)
    model.fuses = False
    plain = step(make_runner(model))  # torch's own operations over the parts of the joined weight
    assert torch.equal(plain[1], expected[1])
    torch.testing.assert_close(plain[2], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of poisoned memory
def test_a_recorded_step_equals_the_eager_one_with_every_switch_on(model: Moondream) -> None:
    """Replayed twice over poisoned graph memory: what programs count as they arrive is 0 again after each."""
    runner = make_runner(model, tokens=130)  # two programs share a row's keys
    with without("own_products", "last_joins", "dependent_launch"):
        plain = step(runner)
    off = [name for name in names() if not is_on(name)]
    assert "last_joins" in off and "pair_rows" in off
    with flipped(*off):
        eager = step(runner)
        torch.testing.assert_close(eager[2], plain[2], rtol=1e-5, atol=1e-6)
        assert torch.equal(eager[1], plain[1])
        recorded = make_runner(model, GraphDevice(), 130)
        assert recorded.graphs is not None
        assert recorded.capture_graph(0, 3, Flavour.GATED)
        graph = recorded.graphs.graph(recorded.slots[0], 3, Flavour.GATED)
        assert graph is not None
        for _ in range(2):
            found = step(recorded, graph.replay)
            assert all(torch.equal(one, other) for one, other in zip(found, eager, strict=True))
    assert recorded.cache.arrivals is not None and not recorded.cache.arrivals.any()


def test_rotation_and_gelu_in_one_launch_change_no_bit() -> None:
    heads, kv_heads, head_dim, rows = 3, 2, 16, 4
    width = (heads + 2 * kv_heads) * head_dim
    product = torch.randn(rows, width + 1100)
    rotation = torch.randn(rows, 4, 2)
    lines = torch.tensor([0, 7, 19, 12], dtype=torch.int32)
    found = []
    for is_one in (False, True):
        keys, values = torch.zeros(4, 5, kv_heads, head_dim), torch.zeros(4, 5, kv_heads, head_dim)
        out = torch.full((rows, 1150), 9.0)
        gelu = (product[:, width:], out[:, 50:])
        index = lines if is_one else lines.long()
        query = rotary_kv_write(
            product[:, :width], rotation, index, keys, values, heads, gelu=gelu if is_one else None
        )
        if not is_one:
            gelu_tanh(*gelu)
        found.append((query, keys, values, out))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert (found[1][3][:, :50] == 9.0).all()


def test_the_smallest_bucket_holds_two_rows_where_that_is_chosen(model: Moondream) -> None:
    assert least_bucket(model) == 1 and bucket_sizes(8, 1) == [1, 2, 4, 8]
    with flipped("pair_rows"):
        assert least_bucket(model) == 1, "our own product takes a bias along"
        with without("own_products"):
            assert least_bucket(model) == 2 and bucket_sizes(8, 2) == [2, 4, 8]
            assert bucket_sizes(1, 2) == [1], "one row is all there may be"


def test_a_card_with_little_shared_memory_multiplies_by_cublas(
    model: Moondream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 KB a multiprocessor on consumer cards, 164 KB on an A100, 228 KB on an H100."""
    card = SimpleNamespace(shared_memory_per_multiprocessor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    for kilobytes, expected in ((100, False), (164, False), (228, True)):
        card.shared_memory_per_multiprocessor = kilobytes << 10
        suits.cache_clear()
        assert has_own_products(torch.device("cuda")) is expected
    with without("own_products"):
        assert not has_own_products(torch.device("cuda"))
    suits.cache_clear()


def test_switches_by_name() -> None:
    switch(["histogram", " one_launch", ""], ["early_copy "])
    try:
        turned = [name for name in names() if getattr(choices(), name) is not is_on(name)]
        assert turned == ["one_launch", "histogram"]
        with flipped("own_products", "last_joins"):
            assert not choices().own_products and choices().last_joins
        with pytest.raises(ValueError, match=r"histogran: no such switch; there are pair_rows, .*histogram"):
            switch(["histogran"])
        with pytest.raises(ValueError, match="megakernel: no such switch"):
            switch(on=["megakernel"])
    finally:
        switch()
    assert choices() == GpuChoices()


def test_dependent_launches_are_asked_for_only_where_they_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper and later, compiled, and chosen; else the kernels have nothing of it."""
    cuda, plain = torch.device("cuda"), {"DEPENDENT": False}
    assert dependent.launch_options(cuda) == plain, "interpreted"
    monkeypatch.setattr(dependent, "is_interpreted", lambda: False)
    assert dependent.launch_options(torch.device("cpu")) == plain
    for capability, expected in (((8, 9), plain), ((9, 0), {"DEPENDENT": True, "launch_pdl": True})):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        dependent._knows.cache_clear()
        assert dependent.launch_options(cuda) == expected
    with without("dependent_launch"):
        assert dependent.launch_options(cuda) == plain, "not chosen"
    dependent._knows.cache_clear()
