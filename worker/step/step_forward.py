"""Owns the forward of a step on a torch device: rows and prefill chunks from their ids to logits. Decode thread.

Which forwards a step has, and when, is the runner's: decode rows by themselves where they are captured, their chunks behind
them, or both at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.protocol import FeatureFormat
from worker.device.contract import Device
from worker.forward import StepTokens, nothing
from worker.models.contract import EncodeCrops, Model
from worker.schedule.plan import StepPlan
from worker.step.chunk_embedding import ChunkEmbedding
from worker.step.chunk_graphs import ChunkGraphs
from worker.step.contract import Progress
from worker.step.decode_graphs import Flavour
from worker.step.features import FeatureCache
from worker.step.kv_memory import kv_memory
from worker.step.prompt_scores import score_chunks
from worker.step.rows import RowTables
from worker.step.slot import Slot
from worker.step.staging import StepShape
from worker.step.step_sampler import StepSampler, Wants
from worker.step.step_tokens import chunk_tokens, decode_tokens, index_of

_IN_GRAPH = {
    Flavour.TEXT: Wants(random=True),  # a captured graph serves greedy and drawn rows alike
    Flavour.GATED: Wants(random=True),  # its plain rows; the others are sampled eagerly behind it
    Flavour.FULL: Wants(random=True, automata=True),
}


class StepForward:
    """Runs the model over a slot's rows and a plan's chunks, with the KV memory and the embedded pictures of one worker.

    `encode`: how crops become features, by default one by one. `format`: of pictures that come encoded.
    """

    def __init__(
        self,
        model: Model,
        device: Device,
        shape: StepShape,
        rows: RowTables,
        sampler: StepSampler,
        *,
        feature_bytes: int,
        encode: EncodeCrops | None = None,
        format: FeatureFormat | None = None,
    ) -> None:
        self.progress: Progress = nothing
        self.cache = kv_memory(model, shape, device)
        features = FeatureCache(model, feature_bytes, device, encode or self.encode_one_by_one, format)
        self.embedding = ChunkEmbedding(model, features)
        self._model, self._rows, self._sampler = model, rows, sampler
        self._max_tokens = shape.max_pages * shape.page_tokens
        self._decodes_values = any(task in model.card.capabilities for task in ("detect", "point"))

    def decode(self, slot: Slot, num_rows: int, flavour: Flavour) -> None:
        """A whole decode step over a slot's first `num_rows` rows, padding included. What graphs record."""
        full = self._decodes_values and flavour is Flavour.FULL
        has_values = self._decodes_values and flavour is not Flavour.TEXT  # of the tokens before, in any row
        hidden, logits = self._model.decode(
            self._embed_rows(slot, num_rows, has_values),
            decode_tokens(slot, num_rows, self._max_tokens, narrow=self._model.fuses),
            self.cache,
        )
        if flavour is Flavour.GATED:
            assert slot.logits is not None and slot.hidden is not None
            slot.logits[:num_rows].copy_(logits)
            slot.hidden[:num_rows].copy_(hidden)
        wants = _IN_GRAPH[flavour]._replace(spatial=full)
        self._sampler.sample(slot, slice(0, num_rows), logits, hidden, None, wants, rows="graph_rows")

    def _embed_rows(self, slot: Slot, num_rows: int, has_values: bool) -> Tensor:
        rows = index_of(slot.fields["rows"][:num_rows], narrow=self._model.fuses)
        last_ids = self._rows.last_ids.index_select(0, rows)
        if not has_values:
            return self._model.embed(last_ids)
        spatial = slot.fields["spatial"][:num_rows] > 0
        return self._model.embed_next(last_ids, self._rows.last_values.index_select(0, rows), spatial)

    def _chunk_tokens(self, slot: Slot, plan: StepPlan) -> tuple[Tensor, StepTokens]:
        """Embeddings of the chunks alone, and where they stand."""
        ids, tokens = chunk_tokens(slot, plan)
        return self.embedding.embed(plan.chunks, ids, taps=tokens.taps), tokens

    def prefill(self, slot: Slot, plan: StepPlan, graphs: ChunkGraphs | None, bucket: int) -> None:
        """The chunks as a forward of their own, by the graph of their bucket or, if that is 0, eagerly as they are;
        logits of rows whose prefill ends go behind the decode rows'."""
        if bucket:
            assert graphs is not None
            self.embedding.embed(plan.chunks, slot.chunks[0, :bucket].long(), graphs.inputs[:bucket])
            graphs.run(slot, bucket)
            hidden = graphs.outputs
        else:
            hidden, tokens = self._chunk_tokens(slot, plan)
            hidden = self._model.forward(hidden, tokens, self.cache)
        if plan.num_scored:
            score_chunks(self._model, slot, plan, hidden, self.progress)
        ends = slice(len(plan.decode), len(plan.samples))
        if ends.start == ends.stop:
            return
        hidden = hidden[slot.fields["sample_index"][ends].long()]
        assert slot.logits is not None and slot.hidden is not None
        slot.logits[ends].copy_(self._model.logits(hidden))
        slot.hidden[ends].copy_(hidden)

    def encode_one_by_one(self, crops: Tensor) -> Tensor:
        """See `EncodeCrops`: crop by crop, with `progress` called between layers and after each."""
        encoder = self._model.encoder
        assert encoder is not None
        encoder.progress = self.progress
        encoded = []
        for crop in crops.split(1):
            encoded.append(encoder.features(crop))
            self.progress()
        return torch.cat(encoded)

    def joint(self, slot: Slot, plan: StepPlan) -> None:
        """Decode rows and chunks in one eager forward, the quickest way where nothing is captured."""
        num_rows = len(plan.decode)
        rows: StepTokens | None = None
        if num_rows:
            has_values = any([seq.is_spatial for seq in plan.decode])
            hidden = self._embed_rows(slot, num_rows, has_values)
            tokens = rows = decode_tokens(slot, num_rows, max(plan.positions) + 1, narrow=self._model.fuses)
        if plan.chunks:
            embedded, tokens = self._chunk_tokens(slot, plan)
            if rows is None:
                hidden = embedded
            else:
                hidden = torch.cat([hidden, embedded])
                own = rows.positions.expand(*tokens.positions.shape[:-1], -1)
                tokens.positions = torch.cat([own, tokens.positions], dim=-1)
                tokens.taps = [(num_rows + first, values) for first, values in tokens.taps]
                tokens.write_index = torch.cat([rows.write_index, tokens.write_index])
                tokens.decode = rows.decode
        tokens.progress = self.progress
        hidden = self._model.forward(hidden, tokens, self.cache)
        num = len(plan.samples)
        if plan.num_scored:
            score_chunks(self._model, slot, plan, hidden[num_rows:], self.progress)
        if plan.chunks:
            if not num:
                return
            hidden = hidden[slot.fields["sample_index"][:num].long()]
        slot.logits, slot.hidden = self._model.logits(hidden), hidden
