"""Owns where a sampling kernel leaves a row's token: the next step's inputs, and the outputs the host reads. Decode thread."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Sinks(NamedTuple):
    """What the kernel writes for the caller, besides returning ids."""

    rows: Tensor  # (R,) int32: the row of `last_ids` that each sample's id goes to
    last_ids: Tensor  # (max_rows + 1,) int64
    outputs: Tensor  # (R, ≥ 2) int32, rows may be strided: id, then whether the row is bad


@triton.jit
def store_token(
    sample,
    token_id,
    is_bad,
    ids_ptr,
    bad_ptr,
    rows_ptr,
    last_ids_ptr,
    outputs_ptr,
    outputs_stride,
    OWN: tl.constexpr,
):
    """Store one sample's id, and with OWN also what `Sinks` names."""
    tl.store(ids_ptr + sample, token_id.to(tl.int64))
    tl.store(bad_ptr + sample, is_bad.to(tl.int32))
    if OWN:
        row = tl.load(rows_ptr + sample)
        tl.store(last_ids_ptr + row, token_id.to(tl.int64))
        tl.store(outputs_ptr + sample * outputs_stride, token_id.to(tl.int32))
        tl.store(outputs_ptr + sample * outputs_stride + 1, is_bad.to(tl.int32))
