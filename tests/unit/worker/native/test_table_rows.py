"""Rows of a packed weight are read back to the last bit, in every format that weights are kept in."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from tests.unit.worker.native.integer_case import random_blocks
from worker.native import products as packing
from worker.native.library import load
from worker.native.products import BF16, Products, products
from worker.native.quantised import KINDS, QuantisedWeight

CPU = torch.device("cpu")
OUTPUTS, INPUTS = 150, 512  # no whole number of panels
INDEX = torch.tensor([0, 149, 1, 15, 16, 63, 64, 65, 127, 128, 15, 148, *range(20, 40)])
found = products(CPU)
pytestmark = pytest.mark.skipif(
    found is None or not found.multiplies(torch.float32), reason="no compiled products"
)


def native() -> Products:
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_files_blocks(kind: str) -> None:
    weight = random_blocks(kind, OUTPUTS, INPUTS)
    rows = native().rows(native().pack(weight), INDEX)
    assert torch.equal(rows, weight.dequantised()[INDEX])


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_floats(activations: torch.dtype, saved: torch.dtype) -> None:
    torch.manual_seed(3)
    weight = torch.randn(160, INPUTS).to(saved)
    if not native().can_multiply(activations, INPUTS, 160) or not native().packs(weight, activations):
        pytest.skip("not packed here")
    assert torch.equal(
        native().rows(native().pack(weight, None, activations), INDEX), weight[INDEX].to(activations)
    )


def test_a_row_that_is_not_there() -> None:
    packed = native().pack(torch.ones(OUTPUTS, INPUTS))
    for row in (-1, OUTPUTS):
        with pytest.raises(IndexError, match="outside the 150"):
            native().rows(packed, torch.tensor([0, row]))


def test_rows_for_matrix_registers() -> None:
    """Their layout, whether or not this processor has them."""
    library: Any = load()
    if library.vector_lanes() != 16:
        pytest.skip("no vectors of 512 bits")
    weight = torch.randn(32, 64).bfloat16()
    tiles = weight.view(2, 16, 32, 2).transpose(1, 2).contiguous()
    index, out = torch.tensor([0, 17, 31]), torch.empty(3, 64)
    where = (ctypes.c_int64(32), ctypes.c_int64(64), ctypes.c_void_p(tiles.data_ptr()))
    rows = (ctypes.c_void_p(index.data_ptr()), ctypes.c_int64(3), ctypes.c_void_p(out.data_ptr()))
    assert library.table_rows(BF16, 1, *where, *rows)
    assert torch.equal(out, weight[index].float())


@pytest.mark.parametrize("kind", packing._SAME_BITS)
def test_blocks_packed_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_blocks(kind, OUTPUTS, INPUTS)
    packed = native().pack(weight)
    monkeypatch.setattr(packing, "_SAME_BITS", ())
    assert isinstance(weight, QuantisedWeight) and torch.equal(packed.memory, native().pack(weight).memory)
