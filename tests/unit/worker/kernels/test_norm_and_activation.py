"""Norms and activations against torch in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worker.kernels.activation import gelu_gate, gelu_tanh, silu_gate
from worker.kernels.norm import layer_norm, rms_norm

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # the interpreter cuts bf16 off instead of rounding


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 32), (3, 100), (5, 2048), (2, 1)])
@pytest.mark.parametrize("centred", [False, True])
def test_norms(rows: int, dim: int, residual: bool, dtype: torch.dtype, centred: bool) -> None:
    wide = (torch.randn(rows, dim + 7) * 3 + 1).to(dtype)
    x = wide[:, :dim]  # strided rows
    other = torch.randn(rows, dim).to(dtype) if residual else None
    weight, bias = torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)
    if centred:
        total, found = layer_norm(x, weight, bias, 1e-5, other)
    else:
        total, found = rms_norm(x, weight, 1e-5, other)
    expected_total = x if other is None else x + other
    torch.testing.assert_close(total, expected_total, rtol=TOLERANCE[dtype], atol=0.01)
    exact = total.double()
    if centred:
        expected = torch.layer_norm(exact, (dim,), weight.double(), bias.double(), 1e-5)
    else:
        expected = F.rms_norm(exact, (dim,), weight.double(), 1e-5)
    assert found.dtype == dtype and error(found, expected) < TOLERANCE[dtype]


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    _, found = rms_norm(x, torch.ones(64), 1e-6)
    assert found.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # exp(60) is inf, and 1 / inf the right 0
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (3, 1500)])
def test_activations(rows: int, dim: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 2 * dim) * 4).to(dtype)
    x[0, 0], x[0, 1] = 60.0, -60.0
    exact = x.double()
    poisoned = torch.full((rows, dim + 5), float("nan")).to(dtype)
    gelu_tanh(x[:, :dim], out=poisoned[:, 5:])
    assert error(poisoned[:, 5:], F.gelu(exact[:, :dim], approximate="tanh")) < TOLERANCE[dtype]
    assert poisoned[:, :5].isnan().all()
    gated = silu_gate(x)
    assert error(gated, F.silu(exact[:, :dim]) * exact[:, dim:]) < TOLERANCE[dtype]
    gated = gelu_gate(x)
    assert error(gated, F.gelu(exact[:, :dim], approximate="tanh") * exact[:, dim:]) < TOLERANCE[dtype]
