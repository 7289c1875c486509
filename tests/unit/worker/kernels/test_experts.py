"""The experts' kernels, interpreted, against the CPU's products."""

from __future__ import annotations

import pytest
import torch

from worker.kernels import experts as kernels
from worker.kernels.experts import Layout, experts_product
from worker.kernels.head_scale import scale_heads
from worker.kernels.routing import choose_experts
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
    monkeypatch.setattr(kernels, "MANY", Layout(16, 32, 32, 4, 2))
    x, ids, weights, first, second = given(30, torch.float32)
    ids[:24, 0] = 3  # two blocks of rows for one expert
    ids[:24, 1] = 4
    expected = Experts(first, second, "silu", torch.float32)(x, ids, weights)
    found = experts_product(x, ids.int(), weights, first, second, "silu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_chosen_experts_are_read() -> None:
    x, _, _, first, second = given(2, torch.float32)
    first[4], second[4] = float("nan"), float("nan")
    ids = torch.tensor([[0, 1], [2, 3]])
    assert experts_product(x, ids, torch.ones(2, 2), first, second, "silu").isfinite().all()


@pytest.mark.parametrize("over_chosen", [True, False])
@pytest.mark.parametrize(("experts", "chosen"), [(64, 8), (5, 2), (3, 3)])
def test_choices(experts: int, chosen: int, over_chosen: bool) -> None:
    logits = torch.randn(7, experts + 2)[:, :experts] * 3  # strided rows
    ids, weights = choose_experts(logits, chosen, over_chosen=over_chosen)
    expected_ids, expected = choose(logits, chosen, over_chosen=over_chosen)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(weights, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what is not a number is what this is about
def test_choices_differ_whatever_the_logits_are() -> None:
    """The product has room for each row once an expert; a row that is at fault shows it in its weights."""
    inf = float("inf")
    logits = torch.tensor(
        [[1.0] * 6, [float("nan")] * 6, [-inf] * 6, [inf] * 6, [0, 1, float("nan"), 2, 3, 4]]
    )
    ids, weights = choose_experts(logits, 3)
    assert all(len(set(row)) == 3 and set(row) <= set(range(6)) for row in ids.tolist())
    assert ids[0].tolist() == [0, 1, 2] and weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert weights[1].isnan().all() and weights[4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_scaled_in_place(dtype: torch.dtype) -> None:
    rows, heads, dim = 3, 5, 24
    qkv = torch.randn(rows, 3 * heads * dim).to(dtype)
    content, alpha = torch.randn(rows, 2 * heads).to(dtype) * 3, torch.randn(heads)
    logs = torch.tensor([[0.0], [3.0], [10.0]])
    position = 0.5 + torch.sigmoid(alpha * logs)
    parts = qkv.float().view(rows, 3, heads, dim).clone()
    parts[:, 0] *= (content[:, :heads].float().tanh() + position).unsqueeze(-1)
    parts[:, 2] *= (content[:, heads:].float().tanh() + position).unsqueeze(-1)
    scale_heads(qkv, content, alpha, logs, heads)
    error = (qkv.float() - parts.view(rows, -1)).norm() / parts.norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)
