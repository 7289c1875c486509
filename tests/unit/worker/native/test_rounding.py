"""The compiled rounding gives the bits of torch's operations in quantiser.py, whatever a matrix is stored in."""

from __future__ import annotations

import pytest
import torch

from worker.native.library import load, torch_alone
from worker.native.quantised import KINDS
from worker.native.quantiser import to_blocks
from worker.native.rounding import round_into

needs_library = pytest.mark.skipif(load() is None, reason="no compiled operations")


def blank(weight: torch.Tensor, kind: str) -> torch.Tensor:
    values, num_bytes, _ = KINDS[kind]
    return torch.empty(len(weight), weight.shape[1] // values * num_bytes, dtype=torch.uint8)


def odd_matrix() -> torch.Tensor:
    """Rows of random sizes; zeros, one value throughout, outliers, few levels, and numbers below what 16-bit scales hold."""
    torch.manual_seed(5)
    weight = torch.randn(67, 96) * torch.rand(67, 1)
    weight[0], weight[1], weight[2, ::32], weight[3] = 0, -0.75, 100.0, 1e-9
    weight[4] *= 1e-7
    weight[5, ::2], weight[6] = 1e-42, torch.randint(0, 3, (96,)).float()
    weight[7] = 59000.0
    return weight


@needs_library
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_torchs(kind: str, dtype: torch.dtype) -> None:
    weight = odd_matrix().to(dtype)
    out = blank(weight, kind)
    assert round_into(weight, kind, out)
    assert torch.equal(out, to_blocks(weight.float(), kind))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_without_the_library_torch_rounds(kind: str) -> None:
    weight = odd_matrix()
    out = blank(weight, kind)
    with torch_alone():
        assert round_into(weight.bfloat16(), kind, out)
        assert not round_into(torch.full_like(weight, float("inf")), kind, out)
    assert torch.equal(out, to_blocks(weight.bfloat16().float(), kind))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4, -1e9])
def test_numbers_that_blocks_cannot_hold_are_told(value: float) -> None:
    weight = torch.ones(40, 64)
    for kind in ("Q8_0", "Q4_1"):
        assert round_into(weight, kind, blank(weight, kind))
    weight[39, 63] = value
    for kind in ("Q8_0", "Q4_1"):
        assert not round_into(weight, kind, blank(weight, kind))
