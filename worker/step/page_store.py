"""Owns reading and writing whole pages of a torch device's KV memory, for other workers, and their format. Decode thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.protocol import PageFormat
from worker.device.contract import Device, pin
from worker.forward import KVCache
from worker.models.contract import Model
from worker.step.kv_memory import page_bytes


class TorchPages:
    """Implements `step.contract.PageStore` over the memory of a runner.

    A page travels as the keys of all layers, their values, then what layers that convolve keep, each contiguous.
    """

    def __init__(self, model: Model, cache: KVCache, device: Device, *, weights: str) -> None:
        """`weights`: fingerprint of the model's files and of how they are read."""
        self.format = format_of(model, cache, weights)
        self._device = device
        self._parts = [*cache.keys, *cache.values, *cache.states]
        self._sizes = [part[0].numel() * part.dtype.itemsize for part in self._parts]
        assert sum(self._sizes) == self.format.page_bytes

    @torch.inference_mode()
    def read(self, pages: Sequence[int]) -> bytes:
        """The contents of pages that no step in flight writes to; the host waits for the copy, and for nothing else."""
        copy = self._device.copy
        with copy.use():
            index = torch.tensor(pages, dtype=torch.int64, device=self._parts[0].device)
            rows = [_as_bytes(part.index_select(0, index), len(pages)) for part in self._parts]
            host = torch.cat(rows, dim=1).cpu()
        return host.numpy().tobytes()

    @torch.inference_mode()
    def write(self, pages: Sequence[int], data: bytes | memoryview) -> None:
        """Fill free pages, in the order of the compute stream: steps launched from here on read them.

        `data` may be given up at once.
        """
        device = self._parts[0].device
        given = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(len(pages), -1)
        with self._device.compute.use():
            rows = pin(given, device).to(device, non_blocking=True)
            index = torch.tensor(pages, dtype=torch.int64, device=device)
            for part, own in zip(self._parts, rows.split(self._sizes, dim=1), strict=True):
                part.index_copy_(0, index, own.contiguous().view(part.dtype).view(-1, *part.shape[1:]))


def format_of(model: Model, cache: KVCache, weights: str) -> PageFormat:
    """What a page of the model holds."""
    layout = f"{model.num_layers} layers of {model.num_kv_heads} heads of {model.head_dim}"
    if cache.states:
        lines, width = cache.states[0].shape[1:]
        layout += f", {len(cache.states)} of {lines} lines of {width} {_name(model.dtype)}"
    num_bytes = page_bytes(model, cache.page_tokens)
    return PageFormat(_name(model.kv_dtype), cache.page_tokens, layout, num_bytes, weights)


def _as_bytes(rows: Tensor, num: int) -> Tensor:
    return rows.reshape(num, -1).view(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
