"""Owns calling the compiled products with weights packed for them. Decode thread; no call holds Python's lock.

A step has four products a layer, and oneDNN spends 14 µs (some 45 with cold caches) on choosing the code for each. Its
bf16 products on matrix registers also round a row differently in different batches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import CDLL, POINTER, Structure, byref, c_int, c_int64, c_void_p
from typing import Literal

import torch
from torch import Tensor

from worker.device.huge_pages import give_back
from worker.native.library import NAMES, bind
from worker.native.quantised import Quantised, QuantisedWeight

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

_SAME_BITS = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
)  # kinds whose blocks are packed without being taken apart (file_blocks.h)

_BF16_INPUTS, _BF16_OUTPUTS = 32, 16  # of weights for bf16 activations, multiples of these
_SLAB_BYTES = 4 << 20
_GROUP_INPUTS = 32  # that are rounded to int8 together

Activations = Literal["auto", "int8", "exact"]
_activations: Activations = "auto"


def use_activations(wanted: Activations) -> None:
    """What activations are multiplied as where weights are in a file's blocks. int8: rounded, 16 inputs to a
    scale (activations.h). exact: as they are. auto: int8, unless they are bf16 and there are matrix registers for that, which take
    long prompts quicker over weights expanded to bf16. Call before any model loads."""
    global _activations
    _activations = wanted


def format_of(weight: Quantised) -> int:
    """What a weight in blocks is kept in."""
    if isinstance(weight, QuantisedWeight):
        return _FORMATS[weight.kind]
    return INT8_REAL if weight.least is not None else INT8_FINE


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
        self._panel: int = library.panel_outputs()
        self._are_bf16.argtypes = (c_int64, c_void_p)
        self._pack_bf16, self._pack_blocks = library.pack_bfloat16_for_float32, library.pack_blocks
        self._pack_bf16.argtypes = (c_int64, c_int64, c_void_p, c_void_p)
        self._pack_blocks.argtypes = (c_int, c_int64, c_int64, *3 * (c_void_p,), c_int64, c_void_p)
        self._pack_bf16.restype = self._pack_blocks.restype = None
        self._pack_file_blocks, self._table_rows = library.pack_file_blocks, library.table_rows
        self._pack_file_blocks.argtypes = (c_int, c_int64, c_int64, c_void_p, c_void_p)
        self._pack_file_blocks.restype = None
        self._table_rows.argtypes = (c_int, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p)
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
        self,
        weight: Tensor | Quantised,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        consumes: bool = False,
    ) -> PackedWeight:
        """weight (out, in) → its elements in the order `multiply` reads them, for activations of `dtype`.

        One in a file's blocks is for activations of one of those that `multiplies_blocks`, and keeps as many bits an element
        as the file has if that is Q8_0, Q4_0 or Q4_1. A tensor is of `dtype`, or one that `packs`.

        An fp32 weight that bf16 holds exactly, as one does that was saved in bf16, is kept in bf16: half the memory, the same
        products to the last bit. `consumes`: nobody reads the tensor afterwards, so its memory is given back on the way.
        """
        if not isinstance(weight, Tensor):
            return self._pack_quantised(weight, bias, dtype)
        outputs, inputs = weight.shape
        if not self.packs(weight, dtype):
            dtype = weight.dtype
        weight = weight.contiguous()
        kept_in = SAME
        if dtype == torch.float32 and inputs % 2 == 0:
            is_bf16 = weight.dtype == torch.bfloat16 or self._are_bf16(weight.numel(), weight.data_ptr())
            kept_in = BF16 if is_bf16 else SAME
        pack = self._pack_bf16 if kept_in == BF16 else self._pack[dtype]
        memory = torch.empty(self.num_bytes(outputs, inputs, kept_in, dtype), dtype=torch.uint8)
        for first, last in self._slabs(outputs, inputs * weight.element_size()):
            slab = weight[first:last]
            slab = slab.to(torch.bfloat16) if kept_in == BF16 else slab
            address = memory.data_ptr() + self._offset(memory, first, outputs)
            pack(last - first, inputs, slab.data_ptr(), address)
            if consumes:
                give_back(weight[first:last].data_ptr(), weight[first:last].nbytes)
        return PackedWeight(memory, bias, inputs, outputs, kept_in, dtype)

    def packs(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether `pack` takes this tensor for activations of `dtype`: one of that dtype, or of bf16 for fp32 activations."""
        halves = weight.dtype == torch.bfloat16 and dtype == torch.float32 and weight.shape[1] % 2 == 0
        return weight.dtype == dtype or halves

    def num_bytes(self, outputs: int, inputs: int, kept_in: int, dtype: torch.dtype = torch.float32) -> int:
        """Memory of a weight (outputs, inputs) packed in that format, for activations of `dtype`."""
        if kept_in == SAME and dtype != torch.float32:
            return -(-outputs // self._panel) * self._panel * inputs * dtype.itemsize
        return int(self._bytes(kept_in, outputs, inputs))

    def _slabs(self, outputs: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """Rows from and to, whole panels of some megabytes: what is made of a slab on its way is small."""
        step = max(1, _SLAB_BYTES // row_bytes // self._panel) * self._panel
        for first in range(0, outputs, step):
            yield first, min(first + step, outputs)

    def _offset(self, memory: Tensor, first: int, outputs: int) -> int:
        """Where the panel of row `first` begins."""
        return memory.numel() // -(-outputs // self._panel) * (first // self._panel)

    def _pack_quantised(self, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> PackedWeight:
        outputs, inputs = weight.shape
        kept_in = format_of(weight)
        rounds = self._rounds(dtype) and inputs % _GROUP_INPUTS == 0
        memory = torch.empty(self.num_bytes(outputs, inputs, kept_in), dtype=torch.uint8)
        if isinstance(weight, QuantisedWeight) and weight.kind in _SAME_BITS:
            blocks = weight.blocks.contiguous()
            self._pack_file_blocks(kept_in, outputs, inputs, blocks.data_ptr(), memory.data_ptr())
            return PackedWeight(memory, bias, inputs, outputs, kept_in, dtype, rounds)
        for first, last in self._slabs(outputs, 2 * inputs):
            levels = weight.part(first, last).levels()
            least = None if levels.least is None else levels.least.contiguous()
            q, scale = levels.q.contiguous(), levels.scale.contiguous()
            self._pack_blocks(
                kept_in,
                last - first,
                inputs,
                q.data_ptr(),
                scale.data_ptr(),
                None if least is None else least.data_ptr(),
                levels.scale_inputs,
                memory.data_ptr() + self._offset(memory, first, outputs),
            )
        return PackedWeight(memory, bias, inputs, outputs, kept_in, dtype, rounds)

    def rows(self, packed: PackedWeight, index: Tensor) -> Tensor:
        """index (N,) int64 → those rows of the weight (N, in) in the dtype of its activations: to the last bit what `pack` was
        given, or a file's own dequantisation. Raises IndexError for a row that it does not have."""
        linear = packed.linear
        kept_in, are_tiles = linear.format, False
        if kept_in == SAME and packed.dtype == torch.bfloat16:
            kept_in, are_tiles = BF16, self._has_tiles
        index = index.to(torch.int64).contiguous()
        out = torch.empty(len(index), linear.inputs)
        where = (linear.outputs, linear.inputs, linear.weight, index.data_ptr(), len(index), out.data_ptr())
        if not self._table_rows(kept_in, are_tiles, *where):
            raise IndexError(f"a row outside the {linear.outputs} of this weight")
        return out.to(packed.dtype)

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
