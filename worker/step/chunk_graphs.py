"""Owns the captured prefill chunks: which graphs there are, and which one serves a step's chunks. Decode thread.

A graph is captured for a slot and a bucket of tokens: a forward of all the step's chunks, padded, from their input
embeddings to their last hidden states. How the tokens fall into chunks is read on the device, from the slot's spans.
docs/gpu.md ("Captured steps") says why, and what padding tokens do.
"""

from __future__ import annotations

import torch

from worker.device.choices import choices
from worker.device.contract import Device
from worker.forward import SPAN_TOKENS, KVCache, StepTokens
from worker.models.contract import Model
from worker.schedule.plan import Chunk, holds_picture
from worker.step.contract import GraphCounts
from worker.step.graph_table import GraphTable
from worker.step.slot import Slot
from worker.step.staging import num_spans, stage_chunk_padding
from worker.step.step_tokens import unpacked

MOST_CHUNKS = 16
"""Chunks that always fit into a graph's spans; more chunks fit if their last spans are nearly full."""
SMALL_BUCKETS = (16, 32, 64, 96, 128, 192, 256)
PREFIX_STEP = 32
MOST_TOKENS = 1024
LAUNCHED_BYTES = 1_250_000_000_000
"""Tokens times bytes of weights that keep a device busy for as long as the launches take the host: 2.5 ms at two
operations a token and two bytes, and 5e14 operations a second. Beyond `MOST_TOKENS` no more buckets are added."""


def chunk_buckets(most_tokens: int, prefix_tokens: int, weight_bytes: int) -> list[int]:
    """Numbers of tokens captured as graphs, none beyond `most_tokens`, in rising order.

    They end where the device takes as long as the launches do, so the smaller the model the later. For one that
    reads pictures there are also those of a picture's prefix, alone and with a short text behind it.
    """
    sizes = set(SMALL_BUCKETS)
    size = SMALL_BUCKETS[-1]
    while size < min(most_tokens, MOST_TOKENS, LAUNCHED_BYTES // max(1, weight_bytes)):
        size += size // 256 * 32  # an eighth of it or less
        sizes.add(size)
    if prefix_tokens:
        whole = -(-prefix_tokens // PREFIX_STEP) * PREFIX_STEP
        sizes.update(whole + PREFIX_STEP * i for i in range(3))
    return sorted(size for size in sizes if size <= most_tokens)


def bucket_of(num_tokens: int, buckets: list[int]) -> int:
    """The bucket to pad so many tokens to; 0 where padding would not pay.

    Padding does not pay beyond the largest bucket, nor where it adds more than an eighth beyond the small buckets.
    """
    bucket = next((size for size in buckets if size >= num_tokens), 0)
    if num_tokens > SMALL_BUCKETS[-1] and 8 * (bucket - num_tokens) > num_tokens:
        return 0
    return bucket


def span_capacity(bucket: int) -> int:
    """Spans that a graph of so many tokens looks at, as far as a slot has them: enough for `MOST_CHUNKS` chunks
    however the tokens fall."""
    return min(bucket, bucket // SPAN_TOKENS + MOST_CHUNKS)


class ChunkGraphs(GraphTable[()]):
    """Graphs of all slots over one input of embeddings and one output of hidden states, (most tokens, D) each.

    One input and one output are enough: steps fill, replay and read them in order on the one compute stream.
    """

    def __init__(
        self,
        device: Device,
        model: Model,
        cache: KVCache,
        buckets: list[int],
        dim: int,
        counts: GraphCounts,
    ) -> None:
        super().__init__(device, self._forward, lambda: "chunk", counts)
        self.buckets = buckets
        self._model = model
        self._cache = cache
        shape = (max(buckets, default=0), dim)
        self.inputs = torch.zeros(shape, dtype=model.dtype, device=device.torch_device)
        self.outputs = torch.zeros_like(self.inputs)

    def pad(self, slot: Slot, chunks: list[Chunk]) -> int:
        """Pad a step's staged chunks up to the bucket that serves them, and return it; 0: they run eagerly as they are.

        It also returns 0 while the model runs without the kernels, because only kernels read spans on the device, and for
        pictures whose features go into several layers, because the graph has a place for those of the first only.
        """
        if self._model.num_taps and any(holds_picture(chunk) for chunk in chunks):
            return 0
        bucket = bucket_of(sum([chunk.num_tokens for chunk in chunks]), self.buckets)
        if not bucket or not self._model.fuses or num_spans(chunks) > span_capacity(bucket):
            return 0
        stage_chunk_padding(slot.host, chunks, bucket, span_capacity(bucket))
        return bucket

    def capture(self, slot: Slot, bucket: int) -> bool:
        """As `GraphTable.capture`; the slot's inputs become padding."""
        stage_chunk_padding(slot.host, [], bucket, span_capacity(bucket))
        slot.upload()
        return super().capture(slot, bucket)

    def _forward(self, slot: Slot, bucket: int) -> None:
        """The model over the slot's first `bucket` chunk tokens, padding included. What graphs record."""
        chunks = slot.chunks[:, :bucket]
        _, positions, writes = unpacked(chunks if choices().narrow_indexes else chunks.long())
        tokens = StepTokens(positions, writes)
        tokens.spans, tokens.tables = slot.spans[: span_capacity(bucket)], slot.chunk_tables
        hidden = self._model.forward(self.inputs[:bucket], tokens, self._cache)
        self.outputs[:bucket].copy_(hidden)
