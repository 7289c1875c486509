"""The experts' kernels, interpreted, against the CPU's products."""

from __future__ import annotations

import pytest
import torch

from worker.kernels import experts as kernels
from worker.kernels.experts import Layout, experts_product
from worker.models.experts import Experts, Gate, choose

EXPERTS, CHOSEN, DIM, INNER = 5, 2, 48, 40  # no powers of two: the edges of tiles are met


def given(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    first = torch.randn(EXPERTS, 2 * INNER, DIM).to(dtype) / DIM**0.5
    second = torch.randn(EXPERTS, DIM, INNER).to(dtype) / INNER**0.5
    x = torch.randn(rows, DIM + 3).to(dtype)[:, :DIM]  # strided rows
    ids, weights = choose(torch.randn(rows, EXPERTS), CHOSEN)
    return x, ids, weights, first, second


@pytest.mark.parametrize("gate", ["silu", "gelu_plus_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 19])
def test_as_on_a_cpu(rows: int, dtype: torch.dtype, gate: Gate) -> None:
    x, ids, weights, first, second = given(rows, dtype)
    expected = Experts(first.float(), second.float(), gate, torch.float32)(x.float(), ids, weights)
    found = experts_product(x, ids, weights, first, second, gate)
    assert found.dtype == dtype
    error = (found.float() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype == torch.float32 else 2e-2)


def test_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW_PAIRS_AN_EXPERT", 1)
    monkeypatch.setattr(kernels, "MANY", Layout(32, 16, 16, 4, 2))
    x, ids, weights, first, second = given(70, torch.float32)
    ids[:60, 0] = 3  # two blocks of rows for one expert
    ids[:60, 1] = 4
    expected = Experts(first, second, "silu", torch.float32)(x, ids, weights)
    found = experts_product(x, ids.int(), weights, first, second, "silu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_chosen_experts_are_read() -> None:
    x, _, _, first, second = given(2, torch.float32)
    first[4], second[4] = float("nan"), float("nan")
    ids = torch.tensor([[0, 1], [2, 3]])
    assert experts_product(x, ids, torch.ones(2, 2), first, second, "silu").isfinite().all()
