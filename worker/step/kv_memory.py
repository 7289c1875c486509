"""Owns allocating a runner's paged memory: keys and values of all layers, and what kernels count in beside them. Decode thread."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.device.contract import Device
from worker.forward import KVCache
from worker.models.contract import Model
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
    return KVCache(layers(), layers(), shape.page_tokens, arrivals)
