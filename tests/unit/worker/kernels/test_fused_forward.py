"""Whole small models through the fused kernels against the same models through plain torch, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loadtest.gpu.devices import ReplayingCpuDevice
from loadtest.gpu.random_models import random_model
from shared.protocol import Sampling, Submit, pack_i32
from tests.unit.worker.loop.simulation import EPOCH
from tests.unit.worker.models.dense_oracle import load, write
from tests.unit.worker.models.paged_driver import Driver, Row
from tests.unit.worker.step.test_torch_runner import Harness
from worker.device.choices import without
from worker.forward import KVCache, PrefillSegment, StepTokens, chunk_spans
from worker.models.dense import Dense
from worker.models.layers import GatedMlp
from worker.models.linear import PackedLinear
from worker.models.moondream import Moondream
from worker.step.chunk_graphs import SMALL_BUCKETS


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are made as on a GPU: the compiled CPU operations lay weights out for themselves."""
    monkeypatch.setattr("worker.native.library.load", lambda: None)


def run(model: Moondream | Dense, prefix: int) -> list[torch.Tensor]:
    """Prefills in one piece and in chunks, beside decode rows, then decode rows and padding: hidden states of each step."""
    driver = Driver(model, num_pages=60, kv_dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    width = model.embed(torch.tensor([0])).shape[1]

    def draw(num: int) -> torch.Tensor:
        return torch.randn(num, width, generator=generator)

    first, second, third = Row(), Row(), Row()
    out = [driver.step([], [(first, draw(33), prefix), (second, draw(7), 0)])]
    out.append(driver.step([(first, draw(1))], [(second, draw(5), 0), (third, draw(17), 0)]))
    rows = (first, second, third)
    out.append(driver.step([(row, draw(1)) for row in rows], padding=1))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "prefix"),
    [("tiny-moondream", 30), ("tiny-moondream3", 30), ("tiny-qwen3", 0), ("tiny-llama", 0)],
)
def test_fused_equals_plain(shape: str, prefix: int) -> None:
    model = random_model(shape, torch.device("cpu"), torch.float32).model
    assert not model.fuses
    plain = run(model, prefix)
    model.fuses = True
    for found, expected in zip(run(model, prefix), plain, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"num_hidden_layers": 2}),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}),
        ("olmo2", {"num_hidden_layers": 1}),
        ("qwen3_moe", {"num_hidden_layers": 1}),
        ("stablelm", {"num_hidden_layers": 1, "use_parallel_residual": True, "qk_layernorm": True}),
    ],
    ids=str,
)
def test_fused_families_equal_plain(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """What a family has of its own, with a GPU's kernels: norms on both sides, windows, caps, two rotations."""
    write(tmp_path, family, **settings)
    model = load(tmp_path)
    assert isinstance(model, Dense)
    plain = run(model, 0)
    model.fuses = True
    for found, expected in zip(run(model, 0), plain, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("stablelm", {"num_hidden_layers": 1, "use_parallel_residual": True}),
        ("qwen2", {"num_hidden_layers": 1}),
    ],
    ids=str,
)
def test_families_by_products_of_few_rows_equal_plain(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Gates, biases and sums within products; the first step has more rows than such a product takes. Then the head."""
    write(tmp_path, family, **settings)
    model = load(tmp_path)
    assert isinstance(model, Dense)
    width = model.embed(torch.tensor([0])).shape[1]
    hidden = torch.randn(37, width)

    def steps() -> list[torch.Tensor]:
        driver, row = Driver(model, num_pages=60, kv_dtype=torch.float32), Row()
        return [
            driver.step([], [(row, hidden[:34], 0)]),
            driver.step([(row, hidden[34:35])], [(Row(), hidden[35:], 0)]),
        ]

    plain = steps()
    model.fuses = True
    found = steps()
    logits = model._head.fused(plain[-1])
    with without("own_products"):
        by_torch = steps()
    for one, other in zip([*found, *by_torch], [*plain, *plain], strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
    torch.testing.assert_close(logits, model._head(plain[-1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [3, 33])
def test_an_mlp_takes_its_gate_in_the_product(rows: int, gelu: bool) -> None:
    """33 rows are too many for it; the sum behind both ways is the same."""
    gate_up = PackedLinear(torch.randn(96, 40) / 6, pack=False, gated=not gelu)
    mlp = GatedMlp(gate_up, PackedLinear(torch.randn(40, 48) / 6, torch.randn(40), pack=False), gelu=gelu)
    x, residual = torch.randn(rows, 40), torch.randn(rows, 40)
    expected = mlp.add(x, residual)
    torch.testing.assert_close(mlp.fused(x, residual), expected)
    assert gate_up.takes_few(x) is (rows == 3)
    with without("own_products"):
        assert not gate_up.takes_few(x)
        torch.testing.assert_close(mlp.fused(x, residual), expected)


def test_a_cut_prefix_is_refused() -> None:
    model = random_model("tiny-moondream", torch.device("cpu"), torch.float32).model
    model.fuses = True
    with pytest.raises(ValueError, match="cuts a prefix"):
        Driver(model).step([], [(Row(), torch.randn(5, 64), 30)])


@pytest.mark.slow
def test_segments_staged_by_the_runner_equal_those_made_here() -> None:
    """Strided tables with other sequences' pages behind a chunk's own, as a slot's buffer holds them."""
    model = random_model("tiny-qwen3", torch.device("cpu"), torch.float32).model
    model.fuses = True
    generator = torch.Generator().manual_seed(1)
    shape = (40, 16, model.num_kv_heads, model.head_dim)
    spans = [(17, 16, 0), (7, 0, 0), (17, 32, 0)]  # tokens, context, prefix
    order = torch.randperm(39, generator=generator).to(torch.int32) + 1
    tables = order[:36].view(3, 12)
    hidden = torch.randn(sum(span[0] for span in spans), 64, generator=generator)
    cache_content = [torch.randn(shape, generator=generator) for _ in range(2 * model.num_layers)]
    found = []
    for staged in (False, True):
        cache = KVCache(
            [content.clone() for content in cache_content[: model.num_layers]],
            [content.clone() for content in cache_content[model.num_layers :]],
            16,
        )
        positions = torch.cat([torch.arange(context, context + num) for num, context, _ in spans])
        of_row = torch.repeat_interleave(torch.arange(3), torch.tensor([num for num, *_ in spans]))
        lines = tables[of_row, positions // 16].long() * 16 + positions % 16
        tokens = StepTokens(positions, lines)
        flat, rows = 0, []
        for row, (num, context, prefix) in enumerate(spans):
            pages = tables[row, : -(-(num + context) // 16)]
            tokens.prefills.append(PrefillSegment(num, context, prefix, pages))
            rows += chunk_spans(row, flat, num, context, prefix)
            flat += num
        if staged:
            tokens.spans, tokens.tables = torch.tensor(rows, dtype=torch.int32), tables
        found.append(model.forward(hidden, tokens, cache))
    assert torch.equal(*found)


@pytest.mark.slow
def test_the_fused_vision_encoder_equals_torch() -> None:
    model = random_model("tiny-moondream", torch.device("cpu"), torch.float32).model
    assert isinstance(model, Moondream)
    crops = torch.randint(0, 256, (3, 70, 70, 3), dtype=torch.uint8)
    plain = model.vision.features(crops)
    assert not model.vision.fuses
    model.vision.fuses = True
    fused = model.vision.features(crops)
    with without("vision_gelu"):
        by_kernel = model.vision.features(crops)
    for found in (fused, by_kernel):
        assert found.shape == plain.shape
        assert float((found - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.slow
def test_a_fused_runner_gives_the_tokens_of_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill by staged segments, mixed steps, padded decode steps, the fused sampler: greedy and drawn rows."""
    model = random_model("tiny-qwen3", torch.device("cpu"), torch.float32).model
    model.card = msgspec.structs.replace(model.card, context_tokens=64)  # captured attention spans all of it
    submits: list[tuple[Submit, list[bytes]]] = []
    for number, prompt in enumerate([[5, 6, 7], list(range(8, 28)), [9]]):
        sampling = Sampling(temperature=0.8 * (number % 2), top_p=0.9, seed=number)
        submit = Submit(EPOCH, number, str(number), pack_i32(prompt), 3, sampling, ignore_eos=True)
        submits.append((submit, []))
    expected = [stream.tokens for stream in Harness(model, depth=1, max_rows=1).answer(submits)]
    model.fuses = True
    monkeypatch.setattr(
        "worker.step.chunk_graphs.LAUNCHED_BYTES", 0
    )  # interpreted kernels are slow over long prompts
    harness = Harness(model, depth=2, max_rows=4, device=ReplayingCpuDevice(), mixed_tokens=20, num_pages=40)
    assert harness.runner.capture_graphs() == 3 * 2 * 3 + 2 * len(SMALL_BUCKETS)
    harness.runner.sampler.use_kernels()
    try:
        assert [stream.tokens for stream in harness.answer(submits)] == expected
    finally:
        model.fuses = False
    assert harness.runner.graph_counts.eager_steps_total == {}
