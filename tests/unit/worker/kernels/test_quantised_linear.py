"""Products with integer weights against the dequantised weight in fp64, and a quantised model through a GPU's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.worker.kernels.test_fused_forward import plain_weights as plain_weights
from tests.unit.worker.models.dense_oracle import write
from tests.unit.worker.models.paged_driver import Driver, Row, quiet, relative_error
from tests.unit.worker.models.small_checkpoint import write_checkpoint
from tests.unit.worker.native.integer_case import random_blocks
from worker.formats.open_source import open_source
from worker.kernels.integer_weight import IntegerWeight, dequantise, quantise, repack
from worker.kernels.quantised_linear import MAX_ROWS, expand, quantised_linear
from worker.models.decoder import Decoder
from worker.models.linear import PackedLinear
from worker.models.registry import load_model
from worker.native.quantised import KINDS, Quantised, stacked
from worker.native.quantised_source import QuantisedSource

CPU = torch.device("cpu")


def integers(weight: Quantised) -> IntegerWeight:
    levels = weight.levels()
    return repack(levels.q, levels.scale, levels.least)


def assert_multiplies(weight: IntegerWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    expected = x.double() @ dequantise(weight).double().t()
    if bias is not None:
        expected += bias.double()
    found = quantised_linear(x, weight, bias)
    assert found.dtype == x.dtype
    most = 1e-5 if x.dtype == torch.float32 else 5e-3
    assert (found.double() - expected).norm() / expected.norm() < most


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("group", "rows", "inputs", "outputs"),
    [(None, 16, 384, 33), (32, 1, 256, 40), (32, 33, 128, 16), (128, 5, 256, 24)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(
    bits: int, group: int | None, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    weight = quantise(torch.randn(outputs, inputs), bits, group)
    assert weight.bits == bits
    assert_multiplies(weight, torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_files_blocks(kind: str) -> None:
    """As they are, whatever the kind: bits, offsets, groups of 16 and 32, and rows that are parts of a wider input."""
    weight = random_blocks(kind, 40, 256)
    made = integers(weight)
    assert made.bits == (4 if kind.startswith("Q4") else 8) and made.unit == (16 if kind == "Q6_K" else 32)
    most = 2**-10 if made.scales.dtype == torch.float16 else 1e-7
    assert relative_error(dequantise(made), weight.dequantised()) < most
    wide = torch.randn(5, 300)
    assert_multiplies(made, wide[:, 20:276], torch.randn(40))
    assert torch.equal(
        quantised_linear(wide[:, :256], made.rows(8, 24)), quantised_linear(wide[:, :256], made)[:, 8:24]
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q6_K"])
def test_many_rows_go_by_the_expanded_weight(kind: str) -> None:
    made = integers(random_blocks(kind, 33, 256))
    assert torch.equal(expand(made, torch.float32), dequantise(made))
    x = torch.randn(MAX_ROWS + 3, 256)
    assert_multiplies(made, x, torch.randn(33))
    pieces = quantised_linear(x, made, None, torch.float64)
    assert pieces.dtype == torch.float64 and relative_error(pieces, quantised_linear(x, made)) < 1e-5


def test_inputs_of_smollm2() -> None:
    """576: four blocks and a half, in five bits a weight."""
    made = integers(random_blocks("Q4_1", 192, 576))
    assert made.num_bytes * 8 == 5 * 192 * 576
    assert_multiplies(made, torch.randn(2, 576).bfloat16())


def test_inputs_that_fill_no_block() -> None:
    assert_multiplies(quantise(torch.randn(8, 90), 4), torch.randn(2, 90))


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.14)])
def test_rounding_error(bits: int, most: float) -> None:
    weight = torch.randn(16, 512)
    found = dequantise(quantise(weight, bits, 128))
    assert float((found - weight).norm() / weight.norm()) < most


def test_a_layer_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.models.linear.by_kernels", lambda device: True)
    first, second = random_blocks("Q4_K", 64, 256), random_blocks("Q8_0", 32, 256)
    for weight in (first, stacked([first, second])):
        bias, x = torch.randn(weight.shape[0]), torch.randn(2, 3, 256)
        layer, plain = PackedLinear(weight, bias), PackedLinear(weight.dequantised(), bias, pack=False)
        residual = torch.randn(2, 3, weight.shape[0])
        assert relative_error(layer(x), plain(x)) < 1e-3
        assert relative_error(layer.logits(x.bfloat16()), plain(x.bfloat16().float())) < 1e-2
        assert layer.logits(x.bfloat16()).dtype == torch.float32
        assert relative_error(layer.gelu(x), plain.gelu(x)) < 1e-3
        assert relative_error(layer.silu_gate(x), plain.silu_gate(x)) < 1e-3
        assert relative_error(layer.add(x, residual), plain.add(x, residual)) < 1e-3
        assert torch.equal(layer.part(16, 48)(x), layer(x)[..., 16:48])


def by_values(
    x: torch.Tensor, weight: IntegerWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """As `quantised_linear`, by torch."""
    return torch.nn.functional.linear(x, dequantise(weight), bias).to(dtype)


def read(model: Decoder) -> list[torch.Tensor]:
    """Hidden states of a prompt of five tokens, and of two rows beside another; then their logits."""
    driver = Driver(model, num_pages=12, kv_dtype=torch.float32)
    ids = torch.tensor([5, 9, 33, 7, 60])
    first, hidden = driver.prefill(model.embed(ids), 0)
    more = driver.step([(first, model.embed(ids[:1]))], [(Row(), model.embed(ids[2:]), 0)])
    return [hidden, more, model.logits(more)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "made"), [("llama", "int4"), ("granite", "int8"), ("moondream", "int4")])
def test_a_quantised_model_by_kernels(
    family: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    if family == "moondream":
        write_checkpoint(folder)
        monkeypatch.setattr("worker.models.moondream.joins", lambda device: True)
    else:
        folder.mkdir()
        write(folder, family, num_hidden_layers=1, hidden_size=96, tie_word_embeddings=True)
    monkeypatch.setattr("worker.models.linear.by_kernels", lambda device: True)
    source = QuantisedSource(open_source(folder), made, tmp_path / "cache")
    model = load_model(source, CPU, torch.float32, quiet)
    assert isinstance(model, Decoder)
    model.fuses = True
    found = read(model)
    assert found[-1].dtype == torch.float32
    monkeypatch.setattr("worker.kernels.quantised_linear.quantised_linear", by_values)
    model.fuses = False
    for one, expected in zip(found, read(model), strict=True):
        assert float((one - expected).norm() / expected.norm()) < 1e-5
