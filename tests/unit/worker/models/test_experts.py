"""Routed experts on a CPU against the plain sum over experts, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.experts import Experts, Gate, choose

EXPERTS, CHOSEN, DIM, INNER = 6, 3, 32, 64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def plain(x: Tensor, ids: Tensor, weights: Tensor, first: Tensor, second: Tensor, gate: Gate) -> Tensor:
    """Every row and expert by itself, in fp64."""
    out = torch.zeros(len(x), second.shape[1], dtype=torch.float64)
    for row in range(len(x)):
        for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            h, g = (first[expert].double() @ x[row].double()).chunk(2)
            inner = F.silu(h) * g if gate == "silu" else F.gelu(h) * (g + 1)
            out[row] += weight * (second[expert].double() @ inner)
    return out


@pytest.mark.parametrize("gate", ["silu", "gelu_plus_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_the_chosen(gate: Gate, dtype: torch.dtype) -> None:
    first = torch.randn(EXPERTS, 2 * INNER, DIM).to(dtype) / DIM**0.5
    second = torch.randn(EXPERTS, DIM, INNER).to(dtype) / INNER**0.5
    x = torch.randn(7, DIM).to(dtype)
    ids, weights = choose(torch.randn(7, EXPERTS), CHOSEN)
    found = Experts(first, second, gate, dtype)(x, ids, weights)
    expected = plain(x, ids, weights, first, second, gate)
    assert found.dtype == dtype
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


def test_a_row_is_the_same_in_any_batch() -> None:
    experts = Experts(
        torch.randn(EXPERTS, 2 * INNER, DIM), torch.randn(EXPERTS, DIM, INNER), "gelu_plus_1", torch.float32
    )
    x = torch.randn(40, DIM)
    ids, weights = choose(torch.randn(40, EXPERTS), CHOSEN)
    whole = experts(x, ids, weights)
    for size in (1, 3, 17):
        for start in range(0, 40 - size, size):
            part = slice(start, start + size)
            assert torch.equal(experts(x[part], ids[part], weights[part]), whole[part])


def test_a_nan_stays_in_its_row() -> None:
    experts = Experts(
        torch.randn(EXPERTS, 2 * INNER, DIM), torch.randn(EXPERTS, DIM, INNER), "silu", torch.float32
    )
    x = torch.randn(5, DIM)
    ids, weights = choose(torch.randn(5, EXPERTS), CHOSEN)
    clean = experts(x, ids, weights)
    x[2] = float("nan")
    spoilt = experts(x, ids, weights)
    assert spoilt[2].isnan().all()
    kept = [0, 1, 3, 4]
    assert torch.equal(spoilt[kept], clean[kept])


def test_only_chosen_experts_are_read() -> None:
    first, second = torch.randn(EXPERTS, 2 * INNER, DIM), torch.randn(EXPERTS, DIM, INNER)
    first[4], second[4] = float("nan"), float("nan")
    x, weights = torch.randn(2, DIM), torch.ones(2, 2)
    found = Experts(first, second, "silu", torch.float32)(x, torch.tensor([[0, 1], [5, 3]]), weights)
    assert found.isfinite().all()


def test_weights_of_the_chosen() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    ids, weights = choose(logits, 2)
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.softmax(torch.tensor([[4.0, 3.0]]), -1))
    _, shares = choose(logits, 2, over_chosen=False)
    torch.testing.assert_close(shares, logits.softmax(-1)[:, [1, 3]])


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"an expert's products are \(128, 32\) and \(32, 63\)"):
        Experts(torch.zeros(2, 128, 32), torch.zeros(2, 32, 63), "silu", torch.float32)
    with pytest.raises(ValueError, match="3 experts' first products, 2 second ones"):
        Experts(torch.zeros(3, 128, 32), torch.zeros(2, 32, 64), "silu", torch.float32)
