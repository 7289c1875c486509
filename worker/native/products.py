"""Owns calling the compiled products with weights packed for them. Decode thread; no call holds Python's lock.

A step has four products a layer, and oneDNN spends 14 µs (some 45 with cold caches) on choosing the code for each. Its
bf16 products on matrix registers also round a row differently in different batches.
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL, POINTER, Structure, byref, c_int, c_int64, c_void_p
from typing import Literal

import torch
from torch import Tensor

from worker.native.library import NAMES, bind
from worker.native.quantised import Levels, Quantised

PLAIN, GELU, ADD, GATE = range(4)
"""What becomes of a sum: stored, its GELU (tanh approximation) stored, stored with the residual added; or a SiLU gate:
of every two vectors of outputs the first gates the second, and half as many are stored (see `interleave`)."""

SAME, BF16, INT8, INT4, INT4_MIN, INT4_REAL, INT8_REAL, INT8_OFFSET, INT8_FINE = range(9)
"""What weights are kept in (formats.h). SAME: the dtype of the activations."""
_FORMATS = {
    "Q8_0": INT8,
    "Q5_0": INT8,
    "Q4_0": INT4,
    "Q4_1": INT4_MIN,
    "Q4_K": INT4_REAL,
    "Q5_1": INT8_OFFSET,
    "Q5_K": INT8_OFFSET,
    "Q6_K": INT8_FINE,
}

_BF16_INPUTS, _BF16_OUTPUTS = 32, 16  # of weights for bf16 activations, multiples of these
_GROUP_INPUTS = 32  # that are rounded to int8 together

Activations = Literal["auto", "int8", "exact"]
_activations: Activations = "auto"


def use_activations(wanted: Activations) -> None:
    """What activations are multiplied as where weights are in a file's blocks. int8: rounded, 16 inputs to a
    scale (activations.h). exact: as they are. auto: int8, unless they are bf16 and there are matrix registers for that, which take
    long prompts quicker over weights expanded to bf16. Call before any model loads."""
    global _activations
    _activations = wanted


class Linear(Structure):
    """A product with packed weights, as stack.h has it."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("format", c_int64),
        ("rounds_inputs", c_int64),
    )


class PackedWeight:
    """A weight and its bias (out,) or None as `multiply` reads them, for activations of `dtype`."""

    __slots__ = ("bias", "dtype", "linear", "memory")

    def __init__(
        self,
        memory: Tensor,
        bias: Tensor | None,
        inputs: int,
        outputs: int,
        kept_in: int,
        dtype: torch.dtype,
        rounds_inputs: bool = False,
    ) -> None:
        self.memory, self.dtype = memory, dtype
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        address = None if self.bias is None else self.bias.data_ptr()
        self.linear = Linear(memory.data_ptr(), address, inputs, outputs, kept_in, rounds_inputs)


class Products:
    """The compiled products of those dtypes of activations that this processor has vectors or matrix registers for."""

    def __init__(self, library: CDLL) -> None:
        self.use_threads = library.use_threads
        self._lanes = library.vector_lanes()
        self._bytes, self._are_bf16 = library.bytes_packed, library.are_bfloat16
        self._bytes.argtypes, self._bytes.restype = (c_int, c_int64, c_int64), c_int64
        self._are_bf16.argtypes = (c_int64, c_void_p)
        self._pack_bf16, self._pack_blocks = library.pack_bfloat16_for_float32, library.pack_blocks
        self._pack_bf16.argtypes = (c_int64, c_int64, c_void_p, c_void_p)
        self._pack_blocks.argtypes = (c_int, c_int64, c_int64, *3 * (c_void_p,), c_int64, c_void_p)
        self._pack_bf16.restype = self._pack_blocks.restype = None
        self._has_integers = bool(library.has_integers())
        self._has_tiles = bool(library.multiplies_by_tiles())
        self._pack, self._multiply = {}, {}
        for dtype, name in NAMES.items():
            pack, multiply = getattr(library, f"pack_{name}"), getattr(library, f"multiply_{name}")
            pack.argtypes = (c_int64, c_int64, c_void_p, c_void_p)
            multiply.argtypes = (POINTER(Linear), c_int64, *3 * (c_void_p,), c_int64, c_int, c_int)
            pack.restype = multiply.restype = None
            self._multiply[dtype] = multiply
            if getattr(library, f"can_multiply_{name}")():
                self._pack[dtype] = pack

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether there are products of activations of `dtype` at all."""
        return dtype in self._pack

    def can_multiply(self, dtype: torch.dtype, inputs: int, outputs: int) -> bool:
        """Whether `pack` takes a weight (outputs, inputs) of `dtype`."""
        if not self.multiplies(dtype) or inputs < 1 or outputs < 1:
            return False
        return dtype == torch.float32 or (inputs % _BF16_INPUTS == 0 and outputs % _BF16_OUTPUTS == 0)

    def multiplies_blocks(self, dtype: torch.dtype) -> bool:
        """Whether there are products of activations of `dtype` with weights in a file's blocks: of fp32, and of all that are
        rounded to int8."""
        return self._rounds(dtype) or (dtype == torch.float32 and self.multiplies(dtype))

    def _rounds(self, dtype: torch.dtype) -> bool:
        """Whether activations of `dtype` are rounded to int8 there."""
        if not self._has_integers or _activations == "exact":
            return False
        return _activations == "int8" or not (self._has_tiles and dtype == torch.bfloat16)

    def interleave(self, gate_up: Tensor) -> Tensor:
        """(2F, ...), all gates before what they gate → the order that `GATE` reads. F a multiple of 16."""
        return gate_up[self.gate_order(len(gate_up))]

    def gate_order(self, outputs: int) -> Tensor:
        """The rows of a weight in the order that `GATE` reads."""
        return torch.arange(outputs).view(2, -1, self._lanes).transpose(0, 1).reshape(-1)

    def pack(
        self, weight: Tensor | Quantised, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> PackedWeight:
        """weight (out, in) → its elements in the order `multiply` reads them, for activations of its dtype.

        One in a file's blocks is for activations of `dtype`, one of those that `multiplies_blocks`, and keeps as many bits an
        element as the file has if that is Q8_0, Q4_0 or Q4_1.

        An fp32 weight that bf16 holds exactly, as one does that was saved in bf16, is kept in bf16: half the memory, the same
        products to the last bit.
        """
        if not isinstance(weight, Tensor):
            return self._pack_quantised(weight, bias, dtype)
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        kept_in, pack = SAME, self._pack[weight.dtype]
        num_bytes = -(-outputs // 64) * 64 * inputs * weight.element_size()
        if weight.dtype == torch.float32:
            if inputs % 2 == 0 and self._are_bf16(weight.numel(), weight.data_ptr()):
                kept_in, pack = BF16, self._pack_bf16
            num_bytes = self._bytes(kept_in, outputs, inputs)
        dtype = weight.dtype
        if kept_in == BF16:
            weight = weight.to(torch.bfloat16)
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        pack(outputs, inputs, weight.data_ptr(), memory.data_ptr())
        return PackedWeight(memory, bias, inputs, outputs, kept_in, dtype)

    def _pack_quantised(self, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> PackedWeight:
        outputs, inputs = weight.shape
        levels: Levels = weight.levels()
        kept_in = _FORMATS.get(weight.kind, INT8_REAL if levels.least is not None else INT8_FINE)
        rounds = self._rounds(dtype) and inputs % _GROUP_INPUTS == 0
        least = None if levels.least is None else levels.least.data_ptr()
        q, scale = levels.q.contiguous(), levels.scale.contiguous()
        memory = torch.empty(self._bytes(kept_in, outputs, inputs), dtype=torch.uint8)
        address = memory.data_ptr()
        self._pack_blocks(
            kept_in, outputs, inputs, q.data_ptr(), scale.data_ptr(), least, levels.scale_inputs, address
        )
        return PackedWeight(memory, bias, inputs, outputs, kept_in, dtype, rounds)

    def multiply(self, x: Tensor, packed: PackedWeight, residual: Tensor | None, kind: int) -> Tensor:
        """x (..., in) and residual (..., out) or None of the packed weight's dtype → (..., out).

        `kind` GATE takes a weight and a bias that went through `interleave`, and gives (..., out / 2).
        """
        outputs = packed.linear.outputs
        out = x.new_empty(*x.shape[:-1], outputs // 2 if kind == GATE else outputs)
        if residual is not None:
            residual = residual.contiguous()
        self._run(x, packed, residual, out, kind, False)
        return out

    def unrounded(self, x: Tensor, packed: PackedWeight) -> Tensor:
        """x (..., in) → (..., out) fp32: the sums as they are, whatever dtype x has."""
        out = x.new_empty(*x.shape[:-1], packed.linear.outputs, dtype=torch.float32)
        self._run(x, packed, None, out, PLAIN, True)
        return out

    def _run(
        self,
        x: Tensor,
        packed: PackedWeight,
        residual: Tensor | None,
        out: Tensor,
        kind: int,
        unrounded: bool,
    ) -> None:
        if x.dtype != packed.dtype:
            raise TypeError(f"activations are {x.dtype}, the weight is packed for {packed.dtype}")
        x = x.contiguous()
        self._multiply[x.dtype](
            byref(packed.linear),
            x.numel() // packed.linear.inputs,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            out.shape[-1],
            kind,
            unrounded,
        )


def products(device: torch.device) -> Products | None:
    """The products; None where they cannot be had (see `library.py`)."""
    return bind(Products, device)


assert ctypes.sizeof(Linear) == 48
