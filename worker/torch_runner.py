"""Owns the tensor side of a step on a torch device: stage → forward → sample → copy out. Decode thread.

The only user of torch beside start-up. Nothing here blocks on the device except `wait`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from worker.automaton_slots import TableLimits
from worker.device.base import Device
from worker.features import FeatureCache
from worker.models.contract import DecodeRows, KVCache, Model, PrefillSegment, ProgressReport, StepTokens
from worker.plan import Chunk, StepPlan, StepResult
from worker.rows import RowTables
from worker.runner import DeviceTimes
from worker.sampler import apply_mask, greedy, penalise, stochastic
from worker.slot import OUTPUT_FIELDS, Slot
from worker.staging import SlotShape, stage_chunks, stage_padding, stage_rows, used_words


class TorchRunner:
    """Runs steps on a torch device, `cpu` or `cuda`."""

    def __init__(
        self,
        model: Model,
        device: Device,
        *,
        num_slots: int,
        num_pages: int,
        page_tokens: int,
        max_rows: int,
        max_sequence_tokens: int,
        step_tokens: int,
        feature_bytes: int = 256 << 20,
        table_limits: TableLimits | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.num_slots = num_slots
        self.page_tokens = page_tokens
        self.max_rows = max_rows
        max_pages = -(-max_sequence_tokens // page_tokens)
        shape = SlotShape(max_rows, max_pages, step_tokens, page_tokens, model.card.vocab_size)
        self.slots = [Slot(number, shape, device) for number in range(num_slots)]
        kv_shape = (num_pages, page_tokens, model.num_kv_heads, model.head_dim)

        def memory() -> list[Tensor]:
            empty = partial(torch.zeros, kv_shape, dtype=model.kv_dtype, device=device.torch_device)
            return [empty() for _ in range(model.num_layers)]

        self.cache = KVCache(memory(), memory(), page_tokens)
        self.rows = RowTables(
            max_rows, model.card.vocab_size, device.torch_device, table_limits or TableLimits()
        )
        self.features = FeatureCache(model, feature_bytes)
        self._suppress = torch.tensor(model.card.suppress_ids, dtype=torch.int64, device=device.torch_device)
        self._fused_sample: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._allowed: Tensor | None = None
        if device.torch_device.type == "cuda":
            from worker.kernels.sample import allowed_words, sample  # triton is imported only where a GPU is

            self._fused_sample = sample
            self._allowed = allowed_words(model.card.suppress_ids, model.card.vocab_size, device.torch_device)
        self._last_sampled = device.compute.record()
        self._previous_end = {slot.number: self._last_sampled for slot in self.slots}
        self.buckets = bucket_sizes(max_rows) if device.captures else []

    # ------------------------------------------------------------------ start-up

    def capture_graphs(self, report: ProgressReport | None = None) -> int:
        """Capture every decode graph of every slot; returns how many. A no-op where nothing is captured."""
        if not self.device.captures:
            return 0
        self.device.synchronize()  # weights and memory were queued on another stream than the captures use
        count = 0
        total = len(self.slots) * len(self.buckets) * len(MODES)
        max_tokens = self.slots[0].shape.max_pages * self.page_tokens
        for bucket in reversed(self.buckets):  # the largest first, so that the pool is grown once
            for slot in self.slots:
                stage_padding(slot.host, 0, bucket)
                slot.packed.copy_(slot.pinned)
                for mode in MODES:
                    slot.graphs[bucket, mode] = self.device.capture(
                        partial(self._decode_body, slot, bucket, max_tokens, mode)
                    )
                    count += 1
                    if report is not None:
                        report("capture graphs", count, total)
        self.device.synchronize()
        return count

    # ------------------------------------------------------------------ a step

    @torch.inference_mode()
    def launch_forward(self, slot_number: int, plan: StepPlan) -> None:
        slot = self.slots[slot_number]
        num_rows = len(plan.decode)
        padded = self._bucket(num_rows) if not plan.chunks else num_rows
        # A captured graph serves any rows, so it always has the path for coordinates.
        slot.has_spatial = self.device.captures or any([seq.is_spatial for seq in plan.decode])
        stage_rows(slot.host, plan)
        if plan.chunks:
            stage_chunks(slot.host, plan)
        if padded > num_rows:
            stage_padding(slot.host, num_rows, padded)
        with self.device.compute.use():
            slot.started = self.device.compute.record()
            self._previous_end[slot_number] = self._last_sampled
            self._upload(slot, plan, padded)
            for table_slot, tables in plan.tables:
                self.rows.upload(table_slot, tables)
            for seq in plan.admitted:
                self.rows.admit(seq)
            if plan.chunks:
                self._mixed_forward(slot, plan)
            elif self.device.captures:
                slot.graphs[padded, _mode(plan)].replay()
            else:
                max_tokens = max(plan.positions) + 1
                self._decode_body(slot, num_rows, max_tokens, GATED)

    @torch.inference_mode()
    def launch_sampling(self, slot_number: int, plan: StepPlan, picks: list[int], *, masked: bool) -> None:
        slot = self.slots[slot_number]
        if not plan.chunks and self.device.captures and _mode(plan) != GATED:
            return  # the graph has sampled
        whole = len(picks) == len(plan.samples)
        index = None if whole else self._upload_picks(slot, picks, group=int(masked))
        words: Tensor | None = None
        if masked:
            num = len(plan.samples)
            with self.device.copy.use():
                slot.masks[:num].copy_(slot.host_masks[:num], non_blocking=True)
            self.device.compute.wait(self.device.copy.record())
            words = slot.masks[:num] if index is None else slot.masks[index]
        with self.device.compute.use():
            chosen = [plan.samples[i] for i in picks]
            random = any(seq.sampling.temperature > 0 for seq in chosen)
            adjusted = any(seq.is_adjusted for seq in chosen)
            spatial = any(seq.is_spatial for seq in chosen)
            automata = any(seq.table_slot for seq in chosen)
            num_top = max((seq.sampling.num_logprobs for seq in chosen), default=-1)
            self._sample(
                slot,
                len(plan.samples),
                index,
                words,
                random=random,
                adjusted=adjusted,
                spatial=spatial,
                automata=automata,
                num_top=num_top,
            )

    @torch.inference_mode()
    def launch_copy(self, slot_number: int, plan: StepPlan) -> None:
        slot = self.slots[slot_number]
        num = len(plan.samples)
        slot.sampled = self._last_sampled = self.device.compute.record()
        if num:
            # Anchored at this step's own event: never behind whatever the compute stream is given next.
            self.device.copy.wait(slot.sampled)
            with self.device.copy.use():
                slot.host_outputs[:num].copy_(slot.outputs[:num], non_blocking=True)
                if any(seq.sampling.num_logprobs > 0 for seq in plan.samples):
                    slot.host_top[:num].copy_(slot.top[:num], non_blocking=True)
            slot.copied = self.device.copy.record()
        else:
            slot.copied = slot.sampled

    def mask_rows(self, slot: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        return self.slots[slot].host_masks_np

    def is_done(self, slot: int) -> bool:
        copied = self.slots[slot].copied
        return copied is not None and copied.query()

    def wait(self, slot_number: int, plan: StepPlan) -> StepResult:
        slot = self.slots[slot_number]
        assert slot.copied is not None
        slot.copied.synchronize()
        num = len(plan.samples)
        out = slot.host_outputs_np[:num]
        floats = out.view(np.float32)
        result = StepResult(out[:, 0].tolist(), out[:, 1].astype(bool).tolist())
        if any(seq.is_spatial for seq in plan.samples):
            result.values = [(x, y) for x, y in floats[:, 2:4].tolist()]
        wanted = max((seq.sampling.num_logprobs for seq in plan.samples), default=-1)
        if wanted >= 0:
            result.logprobs = floats[:, 4].tolist()
        if wanted > 0:
            top = slot.host_top_np[:num]
            half = slot.shape.max_logprobs
            result.top_ids = top[:, :half].tolist()
            result.top_logprobs = top[:, half:].view(np.float32).tolist()
        return result

    def device_times(self, slot_number: int) -> DeviceTimes:
        slot = self.slots[slot_number]
        assert slot.started is not None and slot.sampled is not None and slot.copied is not None
        return DeviceTimes(
            slot.started.elapsed_s(slot.sampled),
            self._previous_end[slot_number].elapsed_s(slot.started),
            slot.sampled.elapsed_s(slot.copied),
        )

    def _upload(self, slot: Slot, plan: StepPlan, padded_rows: int) -> None:
        if slot.on_host:
            return
        num = used_words(plan, slot.shape, padded_rows)
        slot.packed[:num].copy_(slot.pinned[:num], non_blocking=True)

    def _upload_picks(self, slot: Slot, picks: list[int], *, group: int) -> Tensor:
        num = len(picks)
        slot.host_picks_np[group, :num] = picks
        if slot.on_host:
            return slot.host_picks[group, :num]
        with self.device.compute.use():
            slot.picks[group, :num].copy_(slot.host_picks[group, :num], non_blocking=True)
        return slot.picks[group, :num]

    # ------------------------------------------------------------------ forward

    def _decode_body(self, slot: Slot, num_rows: int, max_tokens: int, mode: int) -> None:
        """Embed the last sampled tokens, one forward, logits; and the sampling, unless gated. Capturable."""
        hidden = self.model.forward(
            self._embed_rows(slot, num_rows), self._decode_tokens(slot, num_rows, max_tokens), self.cache
        )
        self._keep(slot, hidden, num_rows)
        if mode != GATED:
            self._sample(
                slot,
                num_rows,
                None,
                None,
                random=mode == RANDOM,
                adjusted=False,
                spatial=False,
                automata=False,
                num_top=-1,
            )

    def _keep(self, slot: Slot, hidden: Tensor, num: int) -> None:
        logits = self.model.logits(hidden)
        if not self.device.captures:
            slot.logits, slot.hidden = logits, hidden
            return
        if slot.logits is None or slot.hidden is None:
            rows = self.max_rows
            slot.logits = torch.zeros((rows, logits.shape[-1]), dtype=logits.dtype, device=logits.device)
            slot.hidden = torch.zeros((rows, hidden.shape[-1]), dtype=hidden.dtype, device=hidden.device)
        slot.logits[:num].copy_(logits)
        slot.hidden[:num].copy_(hidden)

    def _embed_rows(self, slot: Slot, num_rows: int) -> Tensor:
        rows = slot.fields["rows"][:num_rows].long()
        if not slot.has_spatial:
            return self.model.embed(self.rows.last_ids[rows])
        spatial = slot.fields["spatial"][:num_rows] > 0
        return self.model.embed_next(self.rows.last_ids[rows], self.rows.last_values[rows], spatial)

    def _decode_tokens(self, slot: Slot, num_rows: int, max_tokens: int) -> StepTokens:
        return StepTokens(
            slot.fields["positions"][:num_rows].long(),
            slot.fields["write_index"][:num_rows].long(),
            DecodeRows(num_rows, slot.tables[:num_rows], slot.fields["lengths"][:num_rows], max_tokens),
        )

    def _mixed_forward(self, slot: Slot, plan: StepPlan) -> None:
        num_rows = len(plan.decode)
        num_chunk_tokens = sum(chunk.num_tokens for chunk in plan.chunks)
        ids, positions, writes = (section[:num_chunk_tokens].long() for section in slot.chunks)
        hidden = self._embed_chunks(plan.chunks, ids)
        tokens = StepTokens(positions, writes)
        if num_rows:
            hidden = torch.cat([self._embed_rows(slot, num_rows), hidden])
            rows = self._decode_tokens(slot, num_rows, max(plan.positions) + 1)
            tokens.positions = torch.cat([rows.positions, positions])
            tokens.write_index = torch.cat([rows.write_index, writes])
            tokens.decode = rows.decode
        for i, chunk in enumerate(plan.chunks):
            table = slot.chunk_tables[i, : len(chunk.seq.pages)]
            tokens.prefills.append(
                PrefillSegment(chunk.num_tokens, chunk.start, chunk.seq.prefix_tokens, table)
            )
        hidden = self.model.forward(hidden, tokens, self.cache)
        num = len(plan.samples)
        if num:
            self._keep(slot, hidden[slot.fields["sample_index"][:num].long()], num)

    def _embed_chunks(self, chunks: list[Chunk], ids: Tensor) -> Tensor:
        hidden = self.model.embed(ids.clamp_min(0))  # image positions are overwritten below
        wanted = []
        at = 0
        for chunk in chunks:
            for picture in chunk.seq.pictures:
                start = max(picture.position, chunk.start)
                end = min(picture.position + picture.num_tokens, chunk.start + chunk.num_tokens)
                if start < end:
                    wanted.append(
                        (
                            chunk.seq.tenant,
                            picture,
                            at + start - chunk.start,
                            start - picture.position,
                            end - start,
                        )
                    )
            if chunk.seq.values and chunk.start + chunk.num_tokens > chunk.seq.num_prompt:
                self._embed_known_values(chunk, hidden, ids, at)
            at += chunk.num_tokens
        if wanted:
            features = self.features.get((tenant, picture) for tenant, picture, *_ in wanted)
            for tenant, picture, to, offset, num in wanted:
                hidden[to : to + num] = features[tenant, picture.digest][offset : offset + num].to(
                    hidden.dtype
                )
        return hidden

    def _embed_known_values(self, chunk: Chunk, hidden: Tensor, ids: Tensor, at: int) -> None:
        """A resumed spatial sequence: its generated coordinates are embedded by value again."""
        seq = chunk.seq
        for position in range(max(chunk.start, seq.num_prompt), chunk.start + chunk.num_tokens):
            values = seq.values.get(position - seq.num_prompt)
            if values is not None:
                i = at + position - chunk.start
                one = torch.ones(1, dtype=torch.bool, device=hidden.device)
                pair = torch.tensor([values], dtype=torch.float32, device=hidden.device)
                hidden[i] = self.model.embed_next(ids[i : i + 1], pair, one)[0]

    # ------------------------------------------------------------------ sampling

    def _sample(
        self,
        slot: Slot,
        num: int,
        index: Tensor | None,
        words: Tensor | None,
        *,
        random: bool,
        adjusted: bool,
        spatial: bool,
        automata: bool,
        num_top: int,
    ) -> None:
        """Sample all `num` rows (`index` None) or those at `index`; results go to the row tables and outputs."""
        assert slot.logits is not None and slot.hidden is not None

        def pick(tensor: Tensor) -> Tensor:
            return tensor[:num] if index is None else tensor[index]

        logits = pick(slot.logits)
        rows = pick(slot.fields["sample_rows"]).long()
        raw = logits
        if adjusted:
            logits = self._adjust(slot, logits, rows, pick)
        tables = self.rows.automata if automata else None
        if tables is not None:
            logits = tables.mask(logits, rows)
        draw = [pick(slot.fields[name]) for name in ("temperature", "top_k", "top_p", "min_p", "uniform")]
        if self._fused_sample is not None:
            ids, bad = self._fused_sample(logits, *draw, words=words, allowed=self._allowed)
            if logits is not raw:
                bad = ~torch.isfinite(raw.max(dim=-1).values)
        else:
            ids, bad = self._plain_sample(raw, logits, words, draw if random else None)
        self.rows.last_ids.index_copy_(0, rows, ids)
        if tables is not None:
            tables.advance(rows, ids)
        if adjusted:
            self.rows.count(rows, ids)
        if index is None:
            out = slot.outputs[:num]
        else:
            out = torch.zeros((len(ids), OUTPUT_FIELDS), dtype=torch.int32, device=ids.device)
        out[:, 0] = ids
        out[:, 1] = bad
        if spatial:
            values = self.model.decode_values(pick(slot.hidden), ids)
            self.rows.last_values[rows] = values
            out[:, 2:4] = values.view(torch.int32)
        if num_top >= 0:
            self._logprobs(slot, raw, ids, out, index, num, num_top)
        if index is not None:
            slot.outputs[index] = out

    def _plain_sample(
        self, raw: Tensor, logits: Tensor, words: Tensor | None, draw: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """(ids, bad) with torch's own operations; `draw` None: every row is greedy."""
        best = raw.max(dim=-1)
        bad = ~torch.isfinite(best.values)
        if len(self._suppress):
            logits = logits.index_fill(1, self._suppress, -torch.inf)
        if words is not None:
            logits = apply_mask(logits, words)
        if draw is not None:
            return stochastic(logits, *draw), bad
        return (best.indices if logits is raw else greedy(logits)), bad

    def _adjust(self, slot: Slot, logits: Tensor, rows: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        tables, fields = self.rows, slot.fields
        assert tables.bias is not None and tables.stop_bias is not None
        assert tables.counts is not None and tables.seen is not None
        needs = (pick(fields[n]) for n in ("presence", "frequency", "repetition"))
        logits = penalise(logits, tables.counts[rows], tables.seen[rows], *needs)
        logits = logits + tables.bias[rows]
        banned = pick(fields["ban_stop"]).unsqueeze(1) > 0
        return torch.where(banned, logits + tables.stop_bias[rows], logits)

    def _logprobs(
        self, slot: Slot, raw: Tensor, ids: Tensor, out: Tensor, index: Tensor | None, num: int, num_top: int
    ) -> None:
        logprobs = raw.log_softmax(dim=-1)
        out[:, 4] = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).contiguous().view(torch.int32)
        if not num_top:
            return
        half = slot.shape.max_logprobs
        values, top_ids = logprobs.topk(min(half, logprobs.shape[-1]), dim=-1)
        top = torch.zeros((len(ids), 2 * half), dtype=torch.int32, device=ids.device)
        top[:, : top_ids.shape[1]] = top_ids
        top[:, half : half + values.shape[1]] = values.view(torch.int32)
        slot.top[slice(num) if index is None else index] = top

    def _bucket(self, num_rows: int) -> int:
        return next((b for b in self.buckets if b >= num_rows), num_rows)


GATED, GREEDY, RANDOM = MODES = (0, 1, 2)
"""What a captured decode graph does after its logits: wait for the engine, or sample every row."""


def _mode(plan: StepPlan) -> int:
    random = False
    for seq in plan.samples:
        sampling = seq.sampling
        if seq.constraint is not None or sampling.num_logprobs >= 0 or seq.is_adjusted:
            return GATED
        random = random or sampling.temperature > 0
    return RANDOM if random else GREEDY


def bucket_sizes(max_rows: int) -> list[int]:
    """Batch sizes captured as graphs: 1, 2, 4, then every 8 up to 64, then every 32."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, max_rows + 32, 32)]
    return [size for size in sizes if size < max_rows] + [max_rows]
