"""The head gives out fp32 sums unrounded, whatever the weights are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.worker.models.paged_driver import relative_error
from worker.models import head as head_module
from worker.models.head import Head, sums_in_fp32

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (R, 64), a weight (700, 64) and a bias: logits of about 20, which bf16 rounds to eighths."""
    torch.manual_seed(0)
    return torch.randn(rows, 64).to(dtype), (torch.randn(700, 64) * 2.5).to(dtype), torch.randn(700).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
@pytest.mark.parametrize("biased", [False, True])
def test_sums_are_not_rounded(
    dtype: torch.dtype, kept_bytes: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "KEPT_BYTES", kept_bytes)
    x, weight, bias = drawn(dtype)
    found = Head(weight, bias if biased else None)(x)
    exact = x.double() @ weight.double().t() + (bias.double() if biased else 0.0)
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < 1e-6
    if dtype != torch.float32:
        assert relative_error(found, found.to(dtype).float()) > 1e-5, "or this test shows nothing"


def test_near_ties_stay_apart() -> None:
    """Two logits a 32nd apart, at a size at which bf16 knows eighths: the larger is the second."""
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    weight = torch.full((2, 64), 0.3125, dtype=torch.bfloat16)  # 20.0
    weight[1, 0] += 0.03125
    logits = Head(weight)(x)
    assert logits.tolist() == [[20.0, 20.03125]]
    assert logits.bfloat16().argmax() == 0 and logits.argmax() == 1


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_scale_then_cap(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "KEPT_BYTES", kept_bytes)
    x, weight, _ = drawn(torch.bfloat16)
    found = Head(weight, scale=0.125, cap=3.0)(x)
    exact = 3.0 * torch.tanh(x.double() @ weight.double().t() / 8 / 3.0)
    assert relative_error(found, exact) < 1e-6


def test_a_row_of_nan_stays_in_its_row() -> None:
    x, weight, _ = drawn(torch.bfloat16)
    x[1, 3] = torch.nan
    logits = Head(weight)(x)
    assert logits[1].isnan().all() and logits[0].isfinite().all() and logits[2].isfinite().all()


def test_a_device_that_cannot_is_found_out() -> None:
    assert not sums_in_fp32(drawn(torch.bfloat16)[1]), "no CPU has this product today"
