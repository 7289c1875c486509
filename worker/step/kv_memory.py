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
    page = (shape.num_pages, shape.page_tokens, model.num_kv_heads, model.head_dim)

    def layers() -> list[Tensor]:
        return [
            torch.zeros(page, dtype=model.kv_dtype, device=device.torch_device)
            for _ in range(model.num_layers)
        ]

    arrivals: Tensor | None = None
    if device.captures:
        num = shape.max_rows * model.num_kv_heads
        arrivals = torch.zeros(num, dtype=torch.int32, device=device.torch_device)
    states: list[Tensor] = []
    if model.states is not None:
        lines = state_lines(model.states.num_inputs, shape.page_tokens)
        states = [
            torch.zeros(
                (shape.num_pages, lines, model.states.width), dtype=model.dtype, device=device.torch_device
            )
            for _ in range(model.states.num_layers)
        ]
    return KVCache(layers(), layers(), shape.page_tokens, arrivals, states)


def page_bytes(model: Model, page_tokens: int) -> int:
    """Bytes of a page of so many tokens, of all layers."""
    num_values = 2 * model.num_layers * page_tokens * model.num_kv_heads * model.head_dim
    num_bytes = num_values * model.kv_dtype.itemsize
    if model.states is not None:
        lines = state_lines(model.states.num_inputs, page_tokens)
        num_bytes += model.states.num_layers * lines * model.states.width * model.dtype.itemsize
    return num_bytes
