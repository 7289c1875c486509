"""Owns calling the compiled CPU operations on tensors. Decode thread; no call holds Python's lock.

In each layer of a decode step they replace some fifteen torch operations of a few microseconds each, and the copying of
every page before attention reads it.
"""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from worker.native.library import NAMES, bind
from worker.native.token_rows import TokenRows

LANES = 16
HEAD_DIMS = (16, 32, 64, 80, 96, 128)
_POINTER, _COUNT, _SIZE, _REAL = c_void_p, c_int64, c_int, c_float


class Operations:
    """The compiled functions, with their arguments' types. All tensors are on the CPU."""

    def __init__(self, library: CDLL) -> None:
        def declare(name: str, *types: Any) -> Any:
            function = getattr(library, name)
            function.argtypes = types
            function.restype = None
            return function

        self._rms_norm, self._layer_norm, self._silu_gate = {}, {}, {}
        for dtype, name in NAMES.items():
            self._rms_norm[dtype] = declare(
                f"rms_norm_{name}", _COUNT, _COUNT, _POINTER, _POINTER, _REAL, _POINTER
            )
            self._layer_norm[dtype] = declare(
                f"layer_norm_{name}", _COUNT, _COUNT, _POINTER, _POINTER, _POINTER, _REAL, _POINTER
            )
            self._silu_gate[dtype] = declare(f"silu_gate_{name}", _COUNT, _COUNT, _POINTER, _POINTER)
        self._largest = declare("largest_float32", _COUNT, _COUNT, _POINTER, _COUNT, _POINTER, _POINTER)
        self._attend = {}
        for dtypes in (
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        ):
            self._attend[dtypes] = declare(
                f"attend_{NAMES[dtypes[0]]}_{NAMES[dtypes[1]]}",
                *(_COUNT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _POINTER),
                *(
                    _POINTER,
                    _SIZE,
                    _POINTER,
                    _REAL,
                    _SIZE,
                    _SIZE,
                    _SIZE,
                    _SIZE,
                    _SIZE,
                    _REAL,
                    _POINTER,
                    _COUNT,
                ),
            )

    def can_attend(self, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, rotary_dim: int) -> bool:
        """Whether `attend` takes products of `dtype` over pages of `kv_dtype`, with heads of this width."""
        return (dtype, kv_dtype) in self._attend and head_dim in HEAD_DIMS and rotary_dim % LANES == 0

    def attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        write_index: Tensor,
        rows: TokenRows,
        rotation: Tensor,
        num_heads: int,
        out: Tensor,
        qk_weight: Tensor | None = None,
        eps: float = 0.0,
        *,
        window: int = 0,
        cap: float = 0.0,
    ) -> None:
        """New tokens, decode rows' and chunks': normalise q and k heads if `qk_weight` is given, rotate them, write K and V, attend.

        qkv (B, (H + 2·KH)·D), the two of a rotated pair side by side; `keys` and `values` (pages, page_tokens,
        KH, D); write_index (B,) int64; rotation (B, 1, R/2) complex64; qk_weight (H + KH, D) fp32; out (B, H·D) of
        qkv's dtype. What is not finite becomes 0 before it is kept. A query sees itself and the `window` - 1 keys before it
        (0: all of them), a prefix all of itself; a score s becomes cap · tanh(s / cap) if there is a cap.
        """
        _, page_tokens, kv_heads, head_dim = keys.shape
        self._attend[qkv.dtype, keys.dtype](
            qkv.shape[0],
            qkv.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            write_index.data_ptr(),
            *where(rows),
            rows.lengths.data_ptr(),
            rotation.data_ptr(),
            2 * rotation.shape[-1],
            None if qk_weight is None else qk_weight.data_ptr(),
            eps,
            num_heads,
            kv_heads,
            head_dim,
            page_tokens,
            window,
            cap,
            out.data_ptr(),
            out.stride(0),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(N, D) contiguous → (N, D): `x` over the root of its mean square, times weight (D,). D a multiple of 16."""
        out = torch.empty_like(x)
        dim = weight.shape[0]
        self._rms_norm[x.dtype](x.numel() // dim, dim, x.data_ptr(), weight.data_ptr(), eps, out.data_ptr())
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(N, D) contiguous → (N, D): `x` less its mean, over its deviation, times weight (D,), plus bias (D,)."""
        out = torch.empty_like(x)
        dim = weight.shape[0]
        self._layer_norm[x.dtype](
            x.numel() // dim, dim, x.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps, out.data_ptr()
        )
        return out

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V) fp32, rows may be strided → the largest of each row (N,) fp32 and where it first stands (N,) int64.

        NaN, and any place, of a row that holds a NaN.
        """
        assert x.dtype == torch.float32 and x.stride(1) == 1
        rows, count = x.shape
        values, places = x.new_empty(rows), torch.empty(rows, dtype=torch.int64)
        self._largest(rows, count, x.data_ptr(), x.stride(0), values.data_ptr(), places.data_ptr())
        return values, places

    def silu_gate(self, both: Tensor) -> Tensor:
        """(N, 2F) contiguous, gate then up → (N, F): silu(gate) · up. F a multiple of 16."""
        rows, width = both.shape
        out = both.new_empty(rows, width // 2)
        self._silu_gate[both.dtype](rows, width // 2, both.data_ptr(), out.data_ptr())
        return out


def where(rows: TokenRows) -> tuple[int | None, int | None, int]:
    """Addresses of the runs, or of the block tables and a line's elements."""
    if rows.runs is not None:
        return rows.runs.data_ptr(), None, 0
    assert rows.tables is not None
    return None, rows.tables.data_ptr(), rows.tables.stride(0)


def operations(device: torch.device) -> Operations | None:
    """The operations; None where they cannot be had (see `library.py`)."""
    return bind(Operations, device)
