"""Quantised products against the dequantised weight in fp64."""

from __future__ import annotations

import pytest
import torch

from worker.kernels.quantised_linear import dequantise, quantise, quantised_linear


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 256, 40), (16, 384, 33), (5, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(
    bits: int, group: int | None, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    weight = quantise(torch.randn(outputs, inputs), bits, group)
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    found = quantised_linear(x, weight, bias)
    expected = x.double() @ dequantise(weight).double().t() + bias.double()
    assert (found.double() - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 5e-3)


def test_inputs_that_fill_no_block() -> None:
    weight = quantise(torch.randn(8, 90), 4)
    x = torch.randn(2, 90)
    expected = x.double() @ dequantise(weight).double().t()
    assert (quantised_linear(x, weight).double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.14)])
def test_rounding_error(bits: int, most: float) -> None:
    weight = torch.randn(16, 512)
    found = dequantise(quantise(weight, bits, 128))
    assert float((found - weight).norm() / weight.norm()) < most
