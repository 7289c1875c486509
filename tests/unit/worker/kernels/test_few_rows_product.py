"""Products of few rows against fp64, with what follows them; the same bits whatever the batch and whoever arrives last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.kernels.few_rows_product import LAYOUTS, MOST_ROWS, SERVED, choose_share, few_rows_product

NAN = float("nan")
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN passes no comparison."""
    return float((found.double() - expected).norm() / expected.norm())


def counters(weight: Tensor) -> Tensor:
    """As a layer keeps them beside its weight."""
    return torch.zeros(-(-weight.shape[0] // 16), dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 33), (5, 300, 130), (32, 512, 64), (2, 1000, 7)]
)
def test_product_bias_and_sum(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    wide = torch.full((rows, inputs + 24), NAN, dtype=dtype)
    wide[:, 8:-16] = torch.randn(rows, inputs).to(dtype)
    x, weight = wide[:, 8:-16], torch.randn(outputs, inputs).to(dtype)
    bias, residual = torch.randn(outputs).to(dtype), torch.randn(rows, outputs + 3).to(dtype)[:, 3:]
    arrivals = counters(weight)
    exact = x.double() @ weight.double().t()
    assert error(few_rows_product(x, weight, arrivals), exact) < LIMIT[dtype]
    assert error(few_rows_product(x, weight, arrivals, bias), exact + bias.double()) < LIMIT[dtype]
    summed = few_rows_product(x, weight, arrivals, bias, residual=residual)
    assert summed.dtype == dtype and error(summed, exact + bias.double() + residual.double()) < LIMIT[dtype]
    unrounded = few_rows_product(x, weight, arrivals, bias, out_dtype=torch.float32)
    assert unrounded.dtype == torch.float32 and error(unrounded, exact + bias.double()) < 1e-6
    assert not arrivals.any()


@pytest.mark.parametrize("gate", ["silu", "gelu"])
@pytest.mark.parametrize(("inputs", "half"), [(300, 70), (64, 130)])
def test_gates(gate: str, inputs: int, half: int) -> None:
    x, weight, bias = torch.randn(3, inputs), torch.randn(2 * half, inputs) / 8, torch.randn(2 * half)
    residual, arrivals = torch.randn(3, half), counters(weight)
    first, second = (x.double() @ weight.double().t() + bias.double()).chunk(2, 1)
    expected = (F.silu(first) if gate == "silu" else F.gelu(first, approximate="tanh")) * second
    assert error(few_rows_product(x, weight, arrivals, bias, gate=gate), expected) < 1e-6
    found = few_rows_product(x, weight, arrivals, bias, gate=gate, residual=residual)
    assert error(found, expected + residual.double()) < 1e-6
    assert not arrivals.any()


@pytest.mark.parametrize("turned", [100, 30, 130])
def test_gelu_of_the_last_outputs_goes_elsewhere(turned: int) -> None:
    """Also where the border lies within a tile, and where all outputs are turned."""
    x, weight, bias = torch.randn(4, 300), torch.randn(130, 300) / 8, torch.randn(130)
    poisoned = torch.full((4, turned + 20), NAN)
    expected = x.double() @ weight.double().t() + bias.double()
    plain = few_rows_product(x, weight, counters(weight), bias, gelu_out=poisoned[:, 20:])
    assert plain.shape == (4, 130 - turned)
    assert turned == 130 or error(plain, expected[:, : 130 - turned]) < 1e-6
    assert error(poisoned[:, 20:], F.gelu(expected[:, 130 - turned :], approximate="tanh")) < 1e-6
    assert poisoned[:, :20].isnan().all()


def test_a_row_has_the_same_bits_in_every_batch_and_whoever_arrives_last(
    last_first: Callable[[], AbstractContextManager[None]],
) -> None:
    x, weight = torch.randn(MOST_ROWS, 700), torch.randn(65, 700)
    assert choose_share(65, 700, 4)[0] > 2, "this test is about programs that share a tile"
    arrivals = counters(weight)
    expected = few_rows_product(x, weight, arrivals)
    for rows in range(1, MOST_ROWS):
        start = rows % 3 if rows < MOST_ROWS - 3 else 0
        found = few_rows_product(x[start : start + rows], weight, arrivals)
        assert torch.equal(found, expected[start : start + rows]), rows
    with last_first():
        assert torch.equal(few_rows_product(x, weight, arrivals), expected)
    assert not arrivals.any()


def test_a_nan_stays_in_its_row() -> None:
    x, weight = torch.randn(3, 300), torch.randn(70, 300)
    x[1, 5] = NAN
    found = few_rows_product(x, weight, counters(weight))
    assert found.isnan().any(1).tolist() == [False, True, False] and found[1].isnan().all()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "served"])
def test_every_layout_multiplies(name: str) -> None:
    x, weight = torch.randn(2, 300), torch.randn(140, 300) / 8
    found = few_rows_product(x, weight, counters(weight), layout=LAYOUTS[name])
    assert error(found, x.double() @ weight.double().t()) < 1e-6
    first, second = (x.double() @ weight.double().t()).chunk(2, 1)
    gated = few_rows_product(x, weight, counters(weight), gate="silu", layout=LAYOUTS[name])
    assert error(gated, F.silu(first) * second) < 1e-6


def test_shares_cover_the_inputs_and_fill_the_device() -> None:
    for outputs, inputs in [
        (14336, 2048),
        (2048, 10240),
        (51200, 2048),
        (3072, 1024),
        (1024, 3072),
        (70, 90),
    ]:
        splits, share = choose_share(outputs, inputs, 132)
        assert (splits - 1) * share < inputs <= splits * share and share % SERVED.block_in == 0
    assert choose_share(2048, 10240, 132) == (8, 1280), "256 programs for 132 multiprocessors"
    assert choose_share(51200, 2048, 132)[0] == 1
