"""Owns allocating a runner's paged memory: keys and values of all layers, and what kernels count in beside them. Decode thread."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.device.contract import Device
from worker.forward import KVCache
from worker.models.contract import Model
from worker.models.paged_convolution import state_lines
from worker.step.staging import StepShape


def kv_memory(model: Model, shape: StepShape, device: Device) -> KVCache:
    """Zeroed pages. Where steps are captured also `arrivals`, made now: what is made while a graph is recorded belongs to the
    graph, and these must be as a kernel left them when the next one begins."""
    cache = pages_of(model, shape.num_pages, shape.page_tokens)
    if device.captures:
        num = shape.max_rows * model.num_kv_heads
        cache.arrivals = torch.zeros(num, dtype=torch.int32, device=device.torch_device)
    return cache


def pages_of(model: Model, num_pages: int, page_tokens: int) -> KVCache:
    """Zeroed pages of all layers, on the model's device."""

    def layers(num: int, dtype: torch.dtype, *page: int) -> list[Tensor]:
        return [torch.zeros((num_pages, *page), dtype=dtype, device=model.device) for _ in range(num)]

    page = (page_tokens, model.num_kv_heads, model.head_dim)
    keys, values = (layers(model.num_layers, model.kv_dtype, *page) for _ in range(2))
    cache = KVCache(keys, values, page_tokens)
    if (kept := model.states) is not None:
        lines = state_lines(kept.num_inputs, page_tokens)
        cache.states = layers(kept.num_layers, model.dtype, lines, kept.width)
    return cache


def page_bytes(model: Model, page_tokens: int, kv_dtype: torch.dtype | None = None) -> int:
    """Bytes of a page of so many tokens, of all layers; `kv_dtype` None: as the model's is."""
    num_values = 2 * model.num_layers * page_tokens * model.num_kv_heads * model.head_dim
    num_bytes = num_values * (kv_dtype or model.kv_dtype).itemsize
    if model.states is not None:
        lines = state_lines(model.states.num_inputs, page_tokens)
        num_bytes += model.states.num_layers * lines * model.states.width * model.dtype.itemsize
    return num_bytes
