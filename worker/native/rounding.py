"""Owns calling the compiled rounding of matrices to blocks; torch's where there is none, to the same bits. Decode thread, at load."""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from worker.native.library import bind
from worker.native.quantiser import VALUES, fits, to_blocks

_BITS = {"Q8_0": 8, "Q4_1": 4}
_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Rounding:
    """The compiled rounding, shared by the compute threads."""

    def __init__(self, library: CDLL) -> None:
        self._round = library.round_to_blocks
        self._round.argtypes = (c_int, c_int, c_int64, c_void_p, c_void_p)
        self.is_there = bool(library.can_round())

    def __call__(self, weight: Tensor, kind: str, out: Tensor) -> bool:
        """See `round_into`; `weight` is of a dtype that it reads, and contiguous."""
        count = weight.numel() // VALUES
        done = self._round(_BITS[kind], _STORED[weight.dtype], count, weight.data_ptr(), out.data_ptr())
        return bool(done)


def round_into(weight: Tensor, kind: str, out: Tensor) -> bool:
    """weight (outputs, inputs) fp32, bf16 or fp16 on the CPU → `out` (outputs, bytes of a row) uint8, contiguous, in blocks of
    `kind`, Q8_0 or Q4_1; rows are whole blocks. False where blocks cannot hold its numbers: `out` then says nothing."""
    weight = weight.contiguous()
    rounding = bind(Rounding, weight.device)
    if rounding is not None and rounding.is_there:
        assert weight.shape[1] % VALUES == 0 and out.is_contiguous()
        return rounding(weight, kind, out)
    weight = weight.float()
    if not fits(weight):
        return False
    out.copy_(to_blocks(weight, kind))
    return True
