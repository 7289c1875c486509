"""Owns the tensor side of a step on a torch device: stage → forward → sample → copy out. Decode thread.

Nothing here blocks on the device except `wait`. Where steps are captured, decode rows replay their graph and prefill
chunks follow as a forward of their own (docs/gpu.md, "Mixed steps"); elsewhere both share one forward.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shared.protocol import FeatureFormat
from worker.device.choices import choices
from worker.device.contract import Device
from worker.formats.source import ProgressReport
from worker.models.contract import EncodeCrops, Model
from worker.schedule.automaton_places import TableLimits
from worker.schedule.plan import StepPlan, StepResult
from worker.step.chunk_graphs import ChunkGraphs, chunk_buckets
from worker.step.contract import DeviceTimes, GraphCounts, OutOfDeviceMemory, Progress
from worker.step.decode_graphs import DecodeGraphs, Flavour, bucket_sizes, flavour_of, least_bucket
from worker.step.prompt_scores import read_scores
from worker.step.rows import RowTables
from worker.step.slot import Slot
from worker.step.staging import (
    StepShape,
    is_plain,
    stage_chunks,
    stage_ends,
    stage_padding,
    stage_rows,
    used_words,
)
from worker.step.step_forward import StepForward
from worker.step.step_sampler import StepSampler, Which, wants_of
from worker.step.vision_graphs import VisionGraphs


class TorchRunner:
    """Runs steps on a torch device, `cpu` or `cuda`.

    `buckets` are the batch sizes to capture, where steps are captured at all, and `token_buckets` the numbers of
    prefill tokens; by default those of `decode_graphs.bucket_sizes` and `chunk_graphs.chunk_buckets`. `automata`
    False: no constraint will ever live on the device. `format`: of pictures that come encoded.
    """

    def __init__(
        self,
        model: Model,
        device: Device,
        shape: StepShape,
        *,
        feature_bytes: int = 256 << 20,
        table_limits: TableLimits | None = None,
        buckets: list[int] | None = None,
        token_buckets: list[int] | None = None,
        automata: bool = True,
        format: FeatureFormat | None = None,
    ) -> None:
        self.model = model
        self.device = device
        image = model.card.image
        self.shape = shape = replace(shape, position_axes=1 if image is None else image.position_axes)
        self.num_slots = shape.num_slots
        self.slots = [Slot(number, shape, device) for number in range(shape.num_slots)]
        self.rows = RowTables(
            shape.max_rows,
            shape.vocab_size,
            device.torch_device,
            table_limits or TableLimits(),
            model.card.suppress_ids,
        )
        self.sampler = StepSampler(model, self.rows, device.torch_device)
        self.graph_counts = GraphCounts()
        self.graphs: DecodeGraphs | None = None
        self.chunk_graphs: ChunkGraphs | None = None
        self.vision_graphs: VisionGraphs | None = None
        encode: EncodeCrops | None = None
        if model.encoder is not None and model.encoder.crop_size and device.captures:
            self.vision_graphs = VisionGraphs(device, model.encoder, shape.step_crops, self.graph_counts)
            encode = self.vision_graphs.features
        self.forward = StepForward(
            model,
            device,
            shape,
            self.rows,
            self.sampler,
            feature_bytes=feature_bytes,
            encode=encode,
            format=format,
        )
        self.cache = self.forward.cache
        if device.captures:
            self.rows.allocate()
            with torch.inference_mode():
                dim = model.embed(torch.zeros(1, dtype=torch.int64, device=device.torch_device)).shape[1]
            self._allocate_logits(dim)
            flavours = (Flavour.TEXT, Flavour.GATED, *([Flavour.FULL] if automata else []))
            self.graphs = DecodeGraphs(
                device,
                buckets or bucket_sizes(shape.max_rows, least_bucket(model)),
                flavours,
                self.forward.decode,
                self.graph_counts,
            )
            if token_buckets is None:
                token_buckets = chunk_buckets(shape.chunk_tokens, model.prefix_tokens, model.weight_bytes)
            if model.fuses and token_buckets:
                self.chunk_graphs = ChunkGraphs(
                    device, model, self.cache, token_buckets, dim, self.graph_counts
                )
        self._last_sampled = device.compute.record()

    def _allocate_logits(self, dim: int) -> None:
        device, vocab_size = self.device.torch_device, self.model.card.vocab_size
        # Every row begins at a round address: Triton compiles another variant for one that does not.
        width = -(-vocab_size // 16) * 16
        for slot in self.slots:
            slot.logits = torch.zeros((self.shape.max_rows, width), device=device)[:, :vocab_size]
            slot.hidden = torch.zeros((self.shape.max_rows, dim), dtype=self.model.dtype, device=device)

    # ------------------------------------------------------------------ start-up

    def capture_graphs(self, report: ProgressReport | None = None) -> int:
        """Capture every decode and chunk graph of every slot; returns how many. A no-op where nothing is captured."""
        captures = [partial(self.capture_graph, *key) for key in self.graph_keys()]
        captures += [partial(self.capture_chunk_graph, *key) for key in self.chunk_graph_keys()]
        captured = 0
        for done, capture in enumerate(captures, 1):
            captured += capture()
            if report is not None:
                report("capture graphs", done, len(captures))
        self.device.synchronize()
        return captured

    def graph_keys(self) -> list[tuple[int, int, Flavour]]:
        """Every decode graph there may be, the largest bucket first: the memory they share is then grown once."""
        graphs = self.graphs
        if graphs is None:
            return []
        return [
            (slot.number, bucket, flavour)
            for bucket in reversed(graphs.buckets)
            for flavour in graphs.flavours
            for slot in self.slots
        ]

    @torch.inference_mode()
    def capture_graph(self, slot_number: int, bucket: int, flavour: Flavour) -> bool:
        """Capture one decode graph of a slot that no step is using; False if the device refused."""
        assert self.graphs is not None
        slot = self.slots[slot_number]
        stage_padding(slot.host, 0, bucket)
        with self.device.compute.use():
            slot.upload()
            return self.graphs.capture(slot, bucket, flavour)

    def chunk_graph_keys(self) -> list[tuple[int, int]]:
        """Every chunk graph there may be, the largest bucket first."""
        graphs = self.chunk_graphs
        if graphs is None:
            return []
        return [(slot.number, bucket) for bucket in reversed(graphs.buckets) for slot in self.slots]

    @torch.inference_mode()
    def capture_chunk_graph(self, slot_number: int, bucket: int) -> bool:
        """Capture one chunk graph of a slot that no step is using; False if the device refused."""
        assert self.chunk_graphs is not None
        with self.device.compute.use():
            return self.chunk_graphs.capture(self.slots[slot_number], bucket)

    # ------------------------------------------------------------------ a step

    @torch.inference_mode()
    def launch_forward(self, slot_number: int, plan: StepPlan, progress: Progress) -> None:
        slot, graphs = self.slots[slot_number], self.graphs
        num_rows, num = len(plan.decode), len(plan.samples)
        self.forward.progress = progress
        if self.model.encoder is not None:
            self.model.encoder.progress = progress
        padded = graphs.bucket(num_rows) if graphs is not None and num_rows else num_rows
        stage_rows(slot.host, plan)
        token_bucket = 0
        if plan.chunks:
            stage_chunks(slot.host, plan, alone=graphs is not None)
            if self.chunk_graphs is not None:
                token_bucket = self.chunk_graphs.pad(slot, plan.chunks)
        set_aside = padded > num_rows and num > num_rows
        if set_aside:
            stage_ends(slot.host, num_rows, num)
        if padded > num_rows:
            stage_padding(slot.host, num_rows, padded)
        slot.sampled_rows, slot.left_out, slot.early_rows = 0, [], 0
        with self.device.compute.use():
            slot.previous_end = self._last_sampled
            self._upload(slot, used_words(plan, slot.shape, padded))
            for table_place, tables in plan.tables:
                self.rows.upload(table_place, tables)
            for seq in plan.admitted:
                self.rows.admit(seq)
            # Right before the work: a host that is late with the upload leaves the device idle, not busy.
            self.device.compute.record(slot.started)
            if graphs is None:
                self.forward.joint(slot, plan)
                return
            if num_rows:
                flavour = flavour_of(plan.decode)
                graphs.run(slot, padded, flavour)
                slot.sampled_rows = num_rows
                slot.left_out = (
                    [i for i, seq in enumerate(plan.decode) if not is_plain(seq)]
                    if flavour is Flavour.GATED
                    else []
                )
                if plan.chunks and not slot.left_out and choices().early_copy:
                    self._copy_rows(slot, num_rows)
            # the graph has read the padding: the fields of the ending rows go back to their places
            if set_aside:
                slot.sections[:, num_rows:num].copy_(slot.ends[:, : num - num_rows])
            if plan.chunks:
                try:
                    self.forward.prefill(slot, plan, self.chunk_graphs, token_bucket)
                except torch.OutOfMemoryError as error:
                    raise OutOfDeviceMemory(str(error)) from error

    @torch.inference_mode()
    def launch_sampling(self, slot_number: int, plan: StepPlan, picks: list[int], *, masked: bool) -> None:
        slot = self.slots[slot_number]
        if slot.sampled_rows:  # the graph has sampled the others
            picks = [i for i in picks if i >= slot.sampled_rows or i in slot.left_out]
        if not picks:
            return
        with self.device.compute.use():
            which: Which
            if len(picks) == picks[-1] + 1 - picks[0]:
                which = slice(picks[0], picks[-1] + 1)
            else:
                which = slot.upload_picks(picks, group=int(masked))
            words: Tensor | None = None
            if masked:
                num = len(plan.samples)
                with self.device.copy.use():
                    slot.masks[:num].copy_(slot.host_masks[:num], non_blocking=True)
                    self.device.copy.record(slot.masks_here)
                self.device.compute.wait(slot.masks_here)
                words = slot.masks[which]
            assert slot.logits is not None and slot.hidden is not None
            wants = wants_of([plan.samples[i] for i in picks])
            self.sampler.sample(slot, which, slot.logits[which], slot.hidden[which], words, wants)

    def _upload(self, slot: Slot, words: int) -> None:
        """Queue the copy of a step's inputs. Nothing in flight reads them: the slot's last step has been committed, so its
        device work is over. The copy may therefore run beside the step before, and only this step waits for it."""
        uploads, compute = self.device.uploads, self.device.compute
        if uploads is compute or not choices().upload_aside:
            slot.upload(words)
            return
        with uploads.use():
            slot.upload(words)
        compute.wait(uploads.record(slot.uploaded))

    def _copy_rows(self, slot: Slot, num_rows: int) -> None:
        """Copy the decode rows' outputs out behind their graph: the chunks of the step may take ten times as long."""
        copy = self.device.copy
        copy.wait(self.device.compute.record(slot.rows_sampled))
        with copy.use():
            slot.host_outputs[:num_rows].copy_(slot.outputs[:num_rows], non_blocking=True)
        copy.record(slot.rows_copied)
        slot.early_rows = num_rows

    @torch.inference_mode()
    def launch_copy(self, slot_number: int, plan: StepPlan) -> None:
        slot, copy = self.slots[slot_number], self.device.copy
        num, first, num_scored = len(plan.samples), slot.early_rows, plan.num_scored
        self._last_sampled = self.device.compute.record(slot.next_sampled())
        has_outputs = num > first or num_scored > 0
        copied = slot.next_copied(has_outputs=has_outputs)
        if has_outputs:
            # The copy waits for this step's own event, not for work that the compute stream is given later.
            copy.wait(slot.sampled)
            with copy.use():
                if num > first:
                    slot.host_outputs[first:num].copy_(slot.outputs[first:num], non_blocking=True)
                if num_scored:
                    slot.host_scores[:num_scored].copy_(slot.scores[:num_scored], non_blocking=True)
                if any([seq.sampling.num_logprobs > 0 for seq in plan.samples]):
                    slot.host_top[:num].copy_(slot.top[:num], non_blocking=True)
            copy.record(copied)

    def mask_rows(self, slot_number: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        return self.slots[slot_number].host_masks_np

    def is_done(self, slot_number: int) -> bool:
        copied = self.slots[slot_number].copied
        return copied is not None and copied.query()

    def wait_rows(self, slot_number: int, plan: StepPlan) -> StepResult | None:
        slot = self.slots[slot_number]
        if not slot.early_rows:
            return None
        slot.rows_copied.synchronize()
        return slot.read(plan, slot.early_rows)

    def wait(self, slot_number: int, plan: StepPlan) -> StepResult:
        slot = self.slots[slot_number]
        assert slot.copied is not None
        slot.copied.synchronize()
        if slot.early_rows:
            slot.rows_copied.synchronize()
        result = slot.read(plan, len(plan.samples))
        if plan.num_scored:
            result.scores = list(read_scores(slot, plan))
        return result

    def device_times(self, slot_number: int) -> DeviceTimes:
        slot = self.slots[slot_number]
        assert slot.copied is not None
        return DeviceTimes(
            slot.started.elapsed_s(slot.sampled),
            slot.previous_end.elapsed_s(slot.started),
            slot.sampled.elapsed_s(slot.copied),
        )
