"""Owns calling the compiled products with weights packed for them. Decode thread; no call holds Python's lock.

A step has four products a layer, and oneDNN spends 14 µs (some 45 with cold caches) on finding out what each of
them is to run. Besides, its bf16 products on matrix registers round a row otherwise in one batch than in another.
"""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from worker.native.build import compiled

PLAIN, GELU, ADD = range(3)
"""What becomes of a sum: stored, its GELU (tanh approximation) stored, stored with the residual added."""

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_INPUTS = {torch.float32: 1, torch.bfloat16: 32}  # a layer's inputs are a multiple of these,
_OUTPUTS = 16  # and its outputs of this
_PANEL = 64


class Products:
    """The compiled products of those dtypes that this processor has vectors or matrix registers for."""

    def __init__(self, library: CDLL) -> None:
        self._pack, self._multiply = {}, {}
        for dtype, name in _NAMES.items():
            if not getattr(library, f"can_multiply_{name}")():
                continue
            pack, multiply = getattr(library, f"pack_{name}"), getattr(library, f"multiply_{name}")
            pack.argtypes = (c_int64, c_int64, c_void_p, c_void_p)
            multiply.argtypes = (*3 * (c_int64,), *5 * (c_void_p,), c_int64, c_int)
            pack.restype = multiply.restype = None
            self._pack[dtype], self._multiply[dtype] = pack, multiply

    def can_multiply(self, dtype: torch.dtype, inputs: int, outputs: int) -> bool:
        """Whether `pack` takes a weight (outputs, inputs) of `dtype`."""
        return dtype in self._pack and inputs % _INPUTS[dtype] == 0 and outputs % _OUTPUTS == 0

    def pack(self, weight: Tensor) -> Tensor:
        """weight (out, in) → its elements in the order `multiply` reads them, one dimension."""
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        packed = weight.new_empty(-(-outputs // _PANEL) * _PANEL * inputs)
        self._pack[weight.dtype](outputs, inputs, weight.data_ptr(), packed.data_ptr())
        return packed

    def multiply(
        self, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, residual: Tensor | None, kind: int
    ) -> Tensor:
        """x (..., in), bias (out,) and residual (..., out) or None, all of one dtype → (..., out)."""
        x = x.contiguous()
        if residual is not None:
            residual = residual.contiguous()
        inputs = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], outputs)
        self._multiply[x.dtype](
            x.numel() // inputs,
            inputs,
            outputs,
            x.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            outputs,
            kind,
        )
        return out


def products(device: torch.device) -> Products | None:
    """The products, compiled at the first call; None where they cannot be had, or would leave threads idle."""
    return _load() if device.type == "cpu" and torch.get_num_threads() == 1 else None


@lru_cache(maxsize=1)
def _load() -> Products | None:
    library = compiled(Path(__file__).with_name("product.cpp"))
    return None if library is None else Products(library)
