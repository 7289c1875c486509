"""Owns calling all layers of a step at once. Decode thread; the call does not hold Python's lock.

Called one by one, some eighty operations of a few microseconds cost as much again in Python at one row, and each takes
Python's lock back from the I/O thread. The results equal those of the single operations bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import (
    POINTER,
    Structure,
    addressof,
    byref,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_void_p,
    sizeof,
)
from typing import Any

import torch
from torch import Tensor

from worker.forward import KVCache, StepTokens, add_taps
from worker.native.library import NAMES, library
from worker.native.operations import Operations, operations, where
from worker.native.products import Linear
from worker.native.token_rows import token_rows


class GatedLayer(Structure):
    """Attention, then a gated MLP, each behind its RMS norm and added to the residual stream."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("qkv", Linear),
        ("qk_weight", c_void_p),
        ("out", Linear),
        ("mlp_norm", c_void_p),
        ("gate_up", Linear),
        ("down", Linear),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
        ("cap", c_double),
    )


class ParallelLayer(Structure):
    """One layer norm feeds attention and MLP side by side; a product over both adds them to the residual stream."""

    _fields_ = (
        ("norm", c_void_p),
        ("norm_bias", c_void_p),
        ("qkv", Linear),
        ("fc1", Linear),
        ("out", Linear),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
        ("cap", c_double),
    )


class _Step(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("dim", c_int64),
        ("write_index", c_void_p),
        ("runs", c_void_p),
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("lengths", c_void_p),
        ("rotation", c_void_p),
        ("rotary", c_int32),
        ("eps", c_float),
        ("qk_eps", c_float),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("page_tokens", c_int32),
        ("keeps_float", c_int32),
    )


PROGRESS_ROWS = 64
"""Rows of a step from which on a layer takes so long that calls cost nothing beside it."""

Layer = GatedLayer | ParallelLayer
_FUNCTIONS = {GatedLayer: "gated_layers", ParallelLayer: "parallel_layers"}


class LayerStack:
    """The layers of one model, called together over one paged memory.

    `layers` point at weights and norms that the model keeps alive, all of `dtype`; where their keys and values lie is
    filled in here.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        dtype: torch.dtype,
        *,
        num_heads: int,
        eps: float,
        qk_eps: float = 0.0,
        native: Operations,
        call: Callable[..., int],
    ) -> None:
        kind: Any = type(layers[0])
        self._kind = kind
        self._layers = (kind * len(layers))(*layers)
        self._dtype = dtype
        self._native = native
        self._call = call
        self._cache: KVCache | None = None
        self._step = _Step(heads=num_heads, eps=eps, qk_eps=qk_eps)

    def run(self, hidden: Tensor, tokens: StepTokens, cache: KVCache, rotation: Tensor) -> Tensor | None:
        """(N, D) embeddings → (N, D) hidden states before the final norm; writes K and V of the N tokens.

        rotation (N, 1, R/2) complex64. None, and nothing done, for pages that compiled attention does not read. Long steps
        go layer by layer, and tell of their progress in between.
        """
        keys = cache.keys[0]
        if not self._native.can_attend(self._dtype, keys.dtype, keys.shape[3], 2 * rotation.shape[-1]):
            return None
        rows = token_rows(tokens)
        if rows is None:
            return None
        if cache is not self._cache:
            self._attach(cache)
        out = hidden.clone(memory_format=torch.contiguous_format)
        step = self._step
        step.rows, step.dim = out.shape
        step.write_index = tokens.write_index.data_ptr()
        step.runs, step.tables, step.table_stride = where(rows)
        step.lengths = rows.lengths.data_ptr()
        step.rotation, step.rotary = rotation.data_ptr(), 2 * rotation.shape[-1]
        together = len(self._layers) if rows.num <= PROGRESS_ROWS and not tokens.taps else 1
        for first in range(0, len(self._layers), together):
            layers = addressof(self._layers) + first * sizeof(self._kind)
            failed = self._call(byref(step), layers, together, out.data_ptr())
            assert not failed, "can_attend was asked"
            if together == 1:
                add_taps(out, tokens.taps, first)
                tokens.progress()
        return out

    def _attach(self, cache: KVCache) -> None:
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        _, page_tokens, kv_heads, head_dim = cache.keys[0].shape
        step = self._step
        step.page_tokens, step.kv_heads, step.head_dim = page_tokens, kv_heads, head_dim
        step.keeps_float = cache.keys[0].dtype == torch.float32
        self._cache = cache


def layer_stack(
    layers: Sequence[Layer | None], device: torch.device, dtype: torch.dtype, **settings: Any
) -> LayerStack | None:
    """The layers as one call; None where one of them is None or the device has no compiled operations.

    `settings` are `LayerStack`'s: num_heads, eps, qk_eps.
    """
    native, found = operations(device), library(device)
    given = [layer for layer in layers if layer is not None]
    if native is None or found is None or len(given) < len(layers) or dtype not in NAMES:
        return None
    call = getattr(found, f"{_FUNCTIONS[type(given[0])]}_{NAMES[dtype]}")
    call.argtypes = (POINTER(_Step), c_void_p, c_int64, c_void_p)
    call.restype = ctypes.c_int
    return LayerStack(given, dtype, native=native, call=call, **settings)
