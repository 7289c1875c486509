"""Owns calling the compiled products with weights packed for them. Decode thread; no call holds Python's lock.

A step has four products a layer, and oneDNN spends 14 µs (some 45 with cold caches) on finding out what each of
them is to run. Besides, its bf16 products on matrix registers round a row otherwise in one batch than in another.
"""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from worker.native.library import NAMES, bind

PLAIN, GELU, ADD, GATE = range(4)
"""What becomes of a sum: stored, its GELU (tanh approximation) stored, stored with the residual added; or a SiLU gate:
of every 32 outputs the first 16 gate the second, and half as many are stored (see `interleave`)."""

_INPUTS = {torch.float32: 1, torch.bfloat16: 32}  # a layer's inputs are a multiple of these,
_OUTPUTS = 16  # and its outputs of this
_PANEL = 64


def interleave(gate_up: Tensor) -> Tensor:
    """(2F, ...), all gates before what they gate → the order that `GATE` reads. F a multiple of 16."""
    halves = gate_up.view(2, -1, _OUTPUTS, *gate_up.shape[1:])
    return halves.transpose(0, 1).reshape(gate_up.shape)


class Products:
    """The compiled products of those dtypes that this processor has vectors or matrix registers for."""

    def __init__(self, library: CDLL) -> None:
        self._pack, self._multiply = {}, {}
        for dtype, name in NAMES.items():
            if not getattr(library, f"can_multiply_{name}")():
                continue
            pack, multiply = getattr(library, f"pack_{name}"), getattr(library, f"multiply_{name}")
            pack.argtypes = (c_int64, c_int64, c_void_p, c_void_p)
            multiply.argtypes = (*3 * (c_int64,), *5 * (c_void_p,), c_int64, c_int)
            pack.restype = multiply.restype = None
            self._pack[dtype], self._multiply[dtype] = pack, multiply

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether there are products of `dtype` at all."""
        return dtype in self._pack

    def can_multiply(self, dtype: torch.dtype, inputs: int, outputs: int) -> bool:
        """Whether `pack` takes a weight (outputs, inputs) of `dtype`."""
        return self.multiplies(dtype) and inputs % _INPUTS[dtype] == 0 and outputs % _OUTPUTS == 0

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
        """x (..., in), bias (out,) and residual (..., out) or None, all of one dtype → (..., out).

        `kind` GATE takes a weight and a bias that went through `interleave`, and gives (..., out / 2).
        """
        x = x.contiguous()
        if residual is not None:
            residual = residual.contiguous()
        inputs = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], outputs // 2 if kind == GATE else outputs)
        self._multiply[x.dtype](
            x.numel() // inputs,
            inputs,
            outputs,
            x.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            out.shape[-1],
            kind,
        )
        return out


def products(device: torch.device) -> Products | None:
    """The products; None where they cannot be had (see `library.py`)."""
    return bind(Products, device)
