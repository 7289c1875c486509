"""Compiled products of fp32 activations: against float64, a row's bits whatever the batch, formats, and threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.unit.worker.models.paged_driver import relative_error
from tests.unit.worker.native.integer_case import random_blocks
from worker.models.linear import PackedLinear
from worker.native.library import use_threads
from worker.native.products import BF16, SAME, Products, products
from worker.native.quantised import KINDS, Levels, QuantisedWeight, stacked

CPU = torch.device("cpu")
MOST_ROWS = 40
SHAPES = [(32, 1), (64, 17), (96, 64), (320, 100), (576, 33)]


@pytest.fixture
def multiplying() -> Iterator[Products]:
    found = products(CPU)
    if found is None or not found.multiplies(torch.float32):
        pytest.skip("no C++ compiler, or a processor without 256-bit vectors")
    before = torch.get_num_threads()
    yield found
    use_threads(1)
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations as they are; test_integers.py has those that are rounded to int8."""
    monkeypatch.setattr("worker.native.products._activations", "exact")


@pytest.mark.parametrize(("inputs", "outputs"), [*SHAPES, (33, 48), (1, 16), (301, 96)])
@pytest.mark.parametrize("kept_in", [SAME, BF16])
def test_every_number_of_rows_against_float64(
    multiplying: Products, inputs: int, outputs: int, kept_in: int
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs) / 8, torch.randn(outputs)
    if kept_in == BF16:
        weight = weight.bfloat16().float()
    linear = PackedLinear(weight, bias)
    native = linear.native
    assert native is not None and native.format == (kept_in if inputs % 2 == 0 else SAME)
    x, residual = torch.randn(MOST_ROWS, inputs), torch.randn(MOST_ROWS, outputs)
    want = F.linear(x.double(), weight.double(), bias.double())
    whole, added, gelu = linear(x), linear.add(x, residual), linear.gelu(x)
    assert relative_error(whole, want.float()) < 1e-6
    assert relative_error(added, (want + residual.double()).float()) < 1e-6
    assert relative_error(gelu, F.gelu(want, approximate="tanh").float()) < 1e-6
    for rows in range(1, MOST_ROWS):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
        assert torch.equal(linear.add(x[-rows:], residual[-rows:]), added[-rows:]), rows


@pytest.mark.slow
def test_many_rows_of_many_inputs(multiplying: Products) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(48, 1600) / 8, torch.randn(600, 1600)
    linear = PackedLinear(weight)
    whole = linear(x)
    assert relative_error(whole, F.linear(x.double(), weight.double()).float()) < 2e-6
    assert torch.equal(linear(x[300:301]), whole[300:301])


def test_weights_saved_in_bf16_are_kept_so_and_lose_nothing(multiplying: Products) -> None:
    torch.manual_seed(2)
    rounded = torch.randn(64, 64).bfloat16().float()
    whole = torch.cat([rounded, rounded])
    whole[100, 3] += 2**-20  # one weight that bf16 does not hold: all stay in fp32
    halved, kept = PackedLinear(rounded), PackedLinear(whole)
    assert halved._weight.memory.nbytes == rounded.nbytes // 2 and kept._weight.memory.nbytes == whole.nbytes
    x = torch.randn(MOST_ROWS, 64)
    for rows in (1, 2, 3, 5, 7, MOST_ROWS):
        assert torch.equal(halved(x[:rows]), kept(x[:rows])[:, :64])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_multiply_as_their_values_in_fp32(multiplying: Products, kind: str) -> None:
    torch.manual_seed(3)
    for rows, columns in ((96, 256), (33, 512)):
        weight = random_blocks(kind, rows, columns)
        values = weight.dequantised()
        assert values.isfinite().all()
        x, bias = torch.randn(MOST_ROWS, columns), torch.randn(rows)
        linear = PackedLinear(weight, bias)
        plain = PackedLinear(values + 0.0, bias)
        for count in (1, 2, 3, 4, 5, 6, 7, 12, 13, MOST_ROWS):
            got, want = linear(x[:count]), F.linear(x[:count].double(), values.double(), bias.double())
            assert relative_error(got, want.float()) < 4e-6, count
            assert torch.equal(got, linear(x)[:count]), count
            assert torch.equal(got, plain(x[:count])), count


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_reference(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(4)
    weight = random_blocks(kind, 5, 512)
    want = gguf.quants.dequantize(weight.blocks.numpy(), getattr(gguf.GGMLQuantizationType, kind))
    assert np.array_equal(weight.dequantised().numpy(), want)


def test_rows_of_blocks_change_places_and_join(multiplying: Products) -> None:
    torch.manual_seed(5)
    first, second, other = (
        random_blocks("Q4_1", 32, 256),
        random_blocks("Q4_1", 64, 256),
        random_blocks("Q6_K", 32, 256),
    )
    order = torch.randperm(32)
    assert torch.equal(first.ordered(order).dequantised(), first.dequantised()[order])
    alike, unlike = stacked([first, second]), stacked([first, second, other])
    assert isinstance(alike, QuantisedWeight) and isinstance(unlike, Levels)
    values = torch.cat([first.dequantised(), second.dequantised(), other.dequantised()])
    assert torch.equal(alike.dequantised(), values[:96]) and torch.equal(unlike.dequantised(), values)
    x = torch.randn(3, 256)
    for weight, count in ((alike, 96), (unlike, 128)):
        assert relative_error(PackedLinear(weight)(x), F.linear(x, values[:count])) < 4e-6
    gated = PackedLinear(stacked([second, second]), gated=True)
    gate = F.linear(x, second.dequantised())
    assert relative_error(gated.silu_gate(x), F.silu(gate) * gate) < 1e-5


def test_what_is_no_matrix_of_blocks_is_refused() -> None:
    blocks = torch.zeros(4, 18, dtype=torch.uint8)
    with pytest.raises(ValueError, match="Q9"):
        QuantisedWeight("Q9", 4, 32, blocks)
    with pytest.raises(ValueError, match="4 rows of 64"):
        QuantisedWeight("Q4_0", 4, 64, blocks)


def test_without_compiled_products_blocks_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.models.linear.products", lambda device: None)
    weight, x = random_blocks("Q8_0", 32, 64), torch.randn(3, 64)
    assert relative_error(PackedLinear(weight)(x), F.linear(x, weight.dequantised())) < 1e-5


def test_logits_are_not_rounded(multiplying: Products) -> None:
    weight = (torch.randn(48, 64) / 8).bfloat16()
    linear, x = PackedLinear(weight), torch.randn(3, 64).bfloat16()
    found = linear.logits(x)
    assert found.dtype == torch.float32
    want = F.linear(x.double(), weight.double()).float()
    assert relative_error(found, want) < (1e-6 if multiplying.multiplies(torch.bfloat16) else 1e-2)
    assert torch.equal(
        PackedLinear(weight.float()).logits(x.float()), PackedLinear(weight.float())(x.float())
    )


def test_threads_change_no_bit(multiplying: Products) -> None:
    torch.manual_seed(6)
    linears = [PackedLinear(torch.randn(outputs, inputs)) for inputs, outputs in SHAPES]
    linears.append(PackedLinear(random_blocks("Q4_0", 80, 96)))
    inputs = [torch.randn(MOST_ROWS, linear.in_features) for linear in linears]

    def run() -> list[torch.Tensor]:
        return [
            linear(x[:rows])
            for rows in (1, 2, 7, MOST_ROWS)
            for linear, x in zip(linears, inputs, strict=True)
        ]

    alone = run()
    for threads in (2, 3, 1, 2):
        use_threads(threads)
        assert torch.get_num_threads() == 1, "two teams would take the cores from each other"
        for _ in range(20):
            assert all(torch.equal(got, want) for got, want in zip(run(), alone, strict=True))
