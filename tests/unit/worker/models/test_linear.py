"""Packed products equal plain ones, and a row's bits do not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.unit.worker.models.paged_driver import relative_error, same
from worker.models.linear import PackedLinear, can_pack

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_equals_plain_product(dtype: torch.dtype, bias: bool, pack: bool) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(96, 64) / 8, torch.randn(96) if bias else None
    linear = PackedLinear(weight.to(dtype), None if offset is None else offset.to(dtype), pack=pack)
    assert (linear.in_features, linear.out_features) == (64, 96)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for shape in ((1, 64), (5, 64), (2, 7, 64)):
        x, residual = torch.randn(shape), torch.randn(*shape[:-1], 96)
        given, before = x.to(dtype), residual.to(dtype)
        kept = before.clone()
        plain = F.linear(x, weight, offset)
        assert relative_error(linear(given), plain) < tolerance
        assert relative_error(linear.gelu(given), F.gelu(plain, approximate="tanh")) < tolerance
        assert relative_error(linear.add(given, before), plain + residual) < tolerance
        assert torch.equal(before, kept)
        assert linear(given).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (256, 768), (256, 1024), (1024, 256)])
def test_a_row_is_the_same_in_any_batch(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    if not can_pack(CPU, dtype):
        pytest.skip("this CPU runs the plain product")
    torch.manual_seed(1)
    linear = PackedLinear(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype))
    x = torch.randn(65, inputs).to(dtype)
    whole = linear(x)
    for count in (1, 2, 3, 7, 8, 16, 31, 32, 33):
        assert same(linear(x[:count]), whole[:count], 1e-2), count
