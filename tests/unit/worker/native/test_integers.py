"""Integer products of a file's blocks, on every instruction set of this machine: bit for bit what a plain loop computes."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import CDLL

import pytest
import torch
import torch.nn.functional as F

from tests.unit.worker.models.paged_driver import relative_error
from tests.unit.worker.native.integer_case import plain_product, random_blocks
from tests.unit.worker.native.kinds import library_of, other_kinds
from worker.native import products as settings
from worker.native.library import instruction_set, load
from worker.native.products import ADD, GATE, GELU, PLAIN, Products
from worker.native.quantised import KINDS, Levels, QuantisedWeight, stacked

MOST_ROWS = 40
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(37, 256), (160, 512)]


@pytest.fixture(
    scope="module",
    params=["own", *(pytest.param(kind, marks=pytest.mark.slow) for kind in other_kinds())],
)
def library(request: pytest.FixtureRequest) -> Iterator[CDLL]:
    found = load() if request.param == "own" else library_of(request.param)
    if found is None or not found.has_integers():
        pytest.skip("no C++ compiler, or a processor without 256-bit vectors")
    yield found
    found.use_threads(1)


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 activations too, also where there are matrix registers."""
    monkeypatch.setattr(settings, "_activations", "int8")


@pytest.fixture(scope="module")
def multiplying(library: CDLL) -> Products:
    return Products(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows_bit_for_bit(multiplying: Products, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for outputs, inputs in SHAPES:
        weight = random_blocks(kind, outputs, inputs)
        x = (torch.randn(MOST_ROWS, inputs) * torch.rand(MOST_ROWS, 1) * 4).to(dtype)
        x[5] = 0
        x[6, : inputs // 2] *= 1e-30
        packed = multiplying.pack(weight, None, dtype)
        want = plain_product(x, weight)
        found = multiplying.unrounded(x, packed)
        assert torch.equal(found, want), (found - want).abs().max()
        for rows in range(1, MOST_ROWS):
            assert torch.equal(multiplying.unrounded(x[:rows], packed), want[:rows]), rows
            assert torch.equal(multiplying.unrounded(x[-rows:], packed), want[-rows:]), rows
        assert torch.equal(multiplying.multiply(x, packed, None, PLAIN), want.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_is_all_that_is_lost(multiplying: Products, kind: str) -> None:
    torch.manual_seed(1)
    weight = random_blocks(kind, 64, 1024)
    x = torch.randn(3, 1024)
    found = multiplying.unrounded(x, multiplying.pack(weight))
    assert relative_error(found, F.linear(x.double(), weight.dequantised().double()).float()) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_becomes_of_the_sums(multiplying: Products, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight, bias = random_blocks("Q4_1", 96, 256), torch.randn(96).to(dtype)
    x, residual = torch.randn(MOST_ROWS, 256).to(dtype), torch.randn(MOST_ROWS, 96).to(dtype)
    packed = multiplying.pack(weight, bias, dtype)
    sums = plain_product(x, weight) + bias.float()
    assert torch.equal(multiplying.multiply(x, packed, None, PLAIN), sums.to(dtype))
    assert torch.equal(multiplying.multiply(x, packed, residual, ADD), (sums + residual.float()).to(dtype))
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    gelu = multiplying.multiply(x, packed, None, GELU)
    assert relative_error(gelu, F.gelu(sums, approximate="tanh")) < bound
    order = multiplying.gate_order(96)
    gating = multiplying.pack(weight.ordered(order), bias[order], dtype)
    gate, up = sums.chunk(2, -1)
    found = multiplying.multiply(x, gating, None, GATE)
    assert relative_error(found, F.silu(gate) * up) < bound
    assert torch.equal(multiplying.multiply(x[:3], gating, None, GATE), found[:3])


@pytest.mark.parametrize("level", [0, 255, 128, 127, 15, 240])
@pytest.mark.parametrize("kind", KINDS)
def test_extremes_do_not_saturate(multiplying: Products, kind: str, level: int) -> None:
    weight = random_blocks(kind, 33, 256)
    _, num_bytes, _ = KINDS[kind]
    heads = {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4, "Q5_0": 2, "Q5_1": 4, "Q4_K": 16, "Q5_K": 16, "Q6_K": 0}
    ends = {"Q6_K": 192}
    blocks = weight.blocks.view(-1, num_bytes)
    blocks[:, heads[kind] : ends.get(kind, num_bytes)] = level
    x = torch.full((MOST_ROWS, 256), 3.0)
    x[1::4] = -3.0
    x[2::4, ::2] = -3.0
    x[3::4, 1::3] = -3.0
    for dtype in DTYPES:
        found = multiplying.unrounded(x.to(dtype), multiplying.pack(weight, None, dtype))
        assert torch.equal(found, plain_product(x, weight))
        for rows in (1, 2, 4, 5, 8):
            assert torch.equal(
                multiplying.unrounded(x[:rows].to(dtype), multiplying.pack(weight, None, dtype)), found[:rows]
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf, -torch.nan])
def test_a_faulty_row_shows_and_is_alone(multiplying: Products, dtype: torch.dtype, fault: float) -> None:
    torch.manual_seed(3)
    for kind in ("Q4_0", "Q4_1", "Q8_0", "Q6_K"):
        weight = random_blocks(kind, 80, 256)
        packed = multiplying.pack(weight, None, dtype)
        x = torch.randn(MOST_ROWS, 256).to(dtype)
        clean = multiplying.unrounded(x, packed)
        for row, column in ((0, 3), (17, 200), (39, 255)):
            spoilt = x.clone()
            spoilt[row, column] = fault
            found = multiplying.unrounded(spoilt, packed)
            assert not found[row].isfinite().any()
            others = [i for i in range(MOST_ROWS) if i != row]
            assert torch.equal(found[others], clean[others])
            assert not multiplying.unrounded(spoilt[row : row + 1], packed).isfinite().any()


def test_mixed_kinds_are_multiplied_as_levels(multiplying: Products) -> None:
    torch.manual_seed(4)
    parts = [random_blocks(kind, 48, 256) for kind in ("Q4_0", "Q8_0", "Q6_K")]
    x = torch.randn(MOST_ROWS, 256)
    without = stacked(parts)
    assert isinstance(without, Levels) and without.least is None
    with_least = stacked([*parts, random_blocks("Q4_K", 16, 256)])
    assert isinstance(with_least, Levels) and with_least.least is not None
    for weight in (without, with_least):
        found = multiplying.unrounded(x, multiplying.pack(weight))
        assert torch.equal(found, plain_product(x, weight))


def test_threads_change_no_bit(library: CDLL, multiplying: Products) -> None:
    torch.manual_seed(5)
    cases = []
    for kind, outputs, inputs in (
        ("Q4_0", 600, 96),
        ("Q4_1", 33, 576),
        ("Q8_0", 80, 1536),
        ("Q6_K", 1000, 256),
    ):
        packed = multiplying.pack(random_blocks(kind, outputs, inputs))
        x = torch.randn(MOST_ROWS, inputs)
        cases += [(packed, x[:rows]) for rows in (1, 2, 4, 5, MOST_ROWS)]
    alone = [multiplying.unrounded(x, packed) for packed, x in cases]
    for threads in (2, 3, 1):
        library.use_threads(threads)
        for _ in range(10):
            found = [multiplying.unrounded(x, packed) for packed, x in cases]
            assert all(torch.equal(*both) for both in zip(found, alone, strict=True))


def test_exact_activations_are_a_choice(multiplying: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    weight, x = random_blocks("Q8_0", 64, 256), torch.randn(3, 256)
    want = F.linear(x.double(), weight.dequantised().double()).float()
    found = {}
    for choice in ("int8", "exact"):
        monkeypatch.setattr(settings, "_activations", choice)
        packed = multiplying.pack(weight)
        assert bool(packed.linear.rounds_inputs) == (choice == "int8")
        assert multiplying.multiplies_blocks(torch.float32)
        assert multiplying.multiplies_blocks(torch.bfloat16) == (choice == "int8")
        found[choice] = relative_error(multiplying.unrounded(x, packed), want)
    assert found["exact"] < 4e-6 < found["int8"] < 1e-2
    monkeypatch.setattr(settings, "_activations", "auto")
    assert multiplying.pack(weight).linear.rounds_inputs, "fp32 activations are rounded by default"


def test_values_below_any_scale_are_0(multiplying: Products) -> None:
    weight = random_blocks("Q8_0", 32, 64)
    x = torch.full((2, 64), 1e-40)
    x[0, 40] = 1.0
    found = multiplying.unrounded(x, multiplying.pack(weight))
    assert torch.equal(found, plain_product(x, weight)) and not found[1].any()
    assert isinstance(weight, QuantisedWeight)


def test_the_instruction_set_has_a_name(library: CDLL) -> None:
    assert instruction_set(library).startswith("AVX") and instruction_set(library).endswith("int8")
