"""Owns the memory one step touches: staging, device inputs, outputs, events. Allocated at start; decode thread."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from worker.device.contract import Device, Event
from worker.forward import SPAN_FIELDS
from worker.schedule.plan import StepPlan, StepResult
from worker.step.staging import FIELDS, FLOAT_FIELDS, I32, StepShape, Views

OUTPUT_FIELDS = 7
"""Words of one row's outputs: id, bad, then bit for bit as float32 two values, the token's logprob, the values' logprobs."""


SCORE_FIELDS = 2 + 2 * 20
"""Words of one prompt token's scores: its logprob bit for bit, its rank, the most likely ids, their logprobs bit for bit."""


class Slot:
    """One ping-pong working set over a torch device: `host` are numpy views, the rest device tensors.

    Where steps are captured, `logits` (max_rows, V) fp32 and `hidden` (max_rows, D) are fixed memory that graphs
    write and eager sampling reads; elsewhere each forward leaves its own there.
    """

    def __init__(self, number: int, shape: StepShape, device: Device) -> None:
        self.number = number
        self.shape = shape
        rows, pages = shape.max_rows, shape.max_pages
        self.on_host = device.shares_memory  # if so, nothing is copied to the device
        self.pinned = device.pinned((shape.num_words,), torch.int32)
        self.packed = self.pinned if self.on_host else self.pinned.to(device.torch_device, copy=True)
        self.host = Views(self.pinned.numpy(), shape)

        packed = self.packed
        self.sections = packed[: shape.tables_start].view(len(FIELDS), rows)
        self.fields = {
            name: self.sections[i].view(torch.float32) if name in FLOAT_FIELDS else self.sections[i]
            for i, name in enumerate(FIELDS)
        }
        self.tables = packed[shape.tables_start : shape.chunks_start].view(rows, pages)
        self.chunks = packed[shape.chunks_start : shape.ends_start].view(
            shape.chunk_fields, shape.chunk_tokens
        )
        self.ends = packed[shape.ends_start : shape.spans_start].view(len(FIELDS), rows)
        self.spans = packed[shape.spans_start : shape.chunk_tables_start].view(-1, SPAN_FIELDS)
        self.chunk_tables = packed[shape.chunk_tables_start :].view(rows, pages)

        def pair(*size: int, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
            return device.pinned(size, dtype), torch.zeros(size, dtype=dtype, device=device.torch_device)

        self.host_outputs, self.outputs = pair(rows, OUTPUT_FIELDS)
        self.host_top, self.top = pair(rows, 2 * shape.max_logprobs)  # ids, then logprobs bit for bit
        self.host_masks, self.masks = pair(rows, shape.mask_words)
        # Of prompts whose tokens are scored (`worker.step.prompt_scores`): the tokens, and what they got.
        self.host_targets, self.targets = pair(shape.chunk_tokens, dtype=torch.int64)
        self.host_scores, self.scores = pair(shape.chunk_tokens, SCORE_FIELDS)
        self.host_targets_np: np.ndarray[tuple[int], np.dtype[np.int64]] = self.host_targets.numpy()
        self.host_scores_np: I32 = self.host_scores.numpy()
        # Sample indexes of each sampling group: rows without a mask, rows with one.
        self.host_picks, self.picks = pair(2, rows, dtype=torch.int64)
        self.host_outputs_np: I32 = self.host_outputs.numpy()
        self.host_top_np: I32 = self.host_top.numpy()
        self.host_masks_np: I32 = self.host_masks.numpy()
        self.host_picks_np: np.ndarray[tuple[int, int], np.dtype[np.int64]] = self.host_picks.numpy()

        self.logits: Tensor | None = None
        self.hidden: Tensor | None = None  # hidden states of the sampled positions
        self.sampled_rows = 0  # leading samples that the step's graph has sampled itself,
        self.left_out: list[int] = []  # but for these, which are sampled eagerly
        self.early_rows = 0  # leading samples that are copied out behind the graph, before the step's chunks

        self.started: Event = device.event()
        # The next step's commit reads this step's end event once more, when this slot may be in flight again. So two events
        # are used in turn.
        self._sampled = (device.event(), device.event())
        self._turn = 0
        self._copied: Event = device.event()
        self.masks_here: Event = device.event()
        self.uploaded: Event = device.event()
        self.rows_sampled: Event = device.event()  # of the early rows
        self.rows_copied: Event = device.event()
        self.previous_end: Event = device.event()  # of the step launched before this slot's
        self.copied: Event | None = None  # None before the slot's first step

    def upload(self, words: int | None = None) -> None:
        """Queue the copy of the leading `words` of the packed inputs, of all by default, on the current stream."""
        if not self.on_host:
            self.packed[:words].copy_(self.pinned[:words], non_blocking=True)

    def upload_picks(self, picks: list[int], *, group: int) -> Tensor:
        """The sample indexes of one sampling group, (len(picks),) int64 on the device."""
        num = len(picks)
        self.host_picks_np[group, :num] = picks
        if self.on_host:
            return self.host_picks[group, :num]
        self.picks[group, :num].copy_(self.host_picks[group, :num], non_blocking=True)
        return self.picks[group, :num]

    def read(self, plan: StepPlan, num: int) -> StepResult:
        """The outputs of the step's first `num` samples as a `StepResult`; their copy must have been waited for."""
        samples = plan.samples[:num]
        out = self.host_outputs_np[:num]
        floats = out.view(np.float32)
        result = StepResult(out[:, 0].tolist(), out[:, 1].astype(bool).tolist())
        if any([seq.is_spatial for seq in samples]):
            result.values = [(x, y) for x, y in floats[:, 2:4].tolist()]
            if any([seq.is_spatial and seq.sampling.num_logprobs >= 0 for seq in samples]):
                result.value_logprobs = floats[:, 5:7].tolist()
        wanted = max([seq.sampling.num_logprobs for seq in samples], default=-1)
        if wanted >= 0:
            result.logprobs = floats[:, 4].tolist()
        if wanted > 0:
            top = self.host_top_np[:num]
            half = self.shape.max_logprobs
            result.top_ids = top[:, :half].tolist()
            result.top_logprobs = top[:, half:].view(np.float32).tolist()
        return result

    @property
    def sampled(self) -> Event:
        """The end of the slot's newest step on the compute stream."""
        return self._sampled[self._turn]

    def next_sampled(self) -> Event:
        """The event to record at the end of the step now launched."""
        self._turn ^= 1
        return self._sampled[self._turn]

    def next_copied(self, *, has_outputs: bool) -> Event:
        """The event that says the host may read: behind the copy, or right behind a step that samples nothing."""
        self.copied = self._copied if has_outputs else self.sampled
        return self.copied
