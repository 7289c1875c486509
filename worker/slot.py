"""Owns the memory one step touches: staging, device inputs, outputs, events, graphs. Allocated at start; decode thread."""

from __future__ import annotations

import numpy as np
import torch

from worker.device.base import Device, Event, Graph
from worker.staging import FIELDS, FLOAT_FIELDS, I32, SlotShape, Views

OUTPUT_FIELDS = 5
"""Words of one row's outputs: id, bad, then two values and the token's logprob bit for bit as float32."""


class Slot:
    """One ping-pong working set over a torch device: `host` are numpy views, the rest device tensors."""

    def __init__(self, number: int, shape: SlotShape, device: Device) -> None:
        self.number = number
        self.shape = shape
        rows, pages = shape.max_rows, shape.max_pages
        self.on_host = device.torch_device.type == "cpu"  # then the "copy to the device" is no copy at all
        self.pinned = device.pinned((shape.num_words,), torch.int32)
        self.packed = self.pinned if self.on_host else self.pinned.to(device.torch_device)
        self.host = Views(self.pinned.numpy(), shape)

        sections = self.packed[: shape.tables_start].view(len(FIELDS), rows)
        self.fields = {
            name: sections[i].view(torch.float32) if name in FLOAT_FIELDS else sections[i]
            for i, name in enumerate(FIELDS)
        }
        self.tables = self.packed[shape.tables_start : shape.chunks_start].view(rows, pages)
        self.chunks = self.packed[shape.chunks_start : shape.chunk_tables_start].view(3, shape.chunk_tokens)
        self.chunk_tables = self.packed[shape.chunk_tables_start :].view(rows, pages)

        def pair(*size: int, dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
            return device.pinned(size, dtype), torch.zeros(size, dtype=dtype, device=device.torch_device)

        self.host_outputs, self.outputs = pair(rows, OUTPUT_FIELDS)
        self.host_top, self.top = pair(rows, 2 * shape.max_logprobs)  # ids, then logprobs bit for bit
        self.host_masks, self.masks = pair(rows, shape.mask_words)
        self.host_picks, self.picks = pair(
            2, rows, dtype=torch.int64
        )  # sample indexes of each sampling group
        self.host_outputs_np: I32 = self.host_outputs.numpy()
        self.host_top_np: I32 = self.host_top.numpy()
        self.host_masks_np: I32 = self.host_masks.numpy()
        self.host_picks_np: np.ndarray[tuple[int, int], np.dtype[np.int64]] = self.host_picks.numpy()

        self.has_spatial = True  # some decode row may carry a coordinate
        self.logits: torch.Tensor | None = None
        self.hidden: torch.Tensor | None = None  # hidden states of the sampled positions
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.started: Event | None = None
        self.sampled: Event | None = None
        self.copied: Event | None = None
