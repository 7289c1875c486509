"""Owns reading a staged step's tokens from its slot, as a forward is told where they stand. Decode thread."""

from __future__ import annotations

from torch import Tensor

from worker.device.choices import choices
from worker.forward import DecodeRows, PrefillSegment, StepTokens, segments_of
from worker.schedule.plan import StepPlan
from worker.step.slot import Slot
from worker.step.staging import num_spans


def index_of(field: Tensor, *, narrow: bool) -> Tensor:
    """An int32 field as the forward takes indexes: kernels take it as it is (`narrow`), all else wants int64."""
    return field if narrow and choices().narrow_indexes else field.long()


def decode_tokens(slot: Slot, num_rows: int, max_tokens: int, *, narrow: bool) -> StepTokens:
    """The first `num_rows` decode rows, of at most `max_tokens` tokens each."""
    return StepTokens(
        index_of(slot.fields["positions"][:num_rows], narrow=narrow),
        index_of(slot.fields["write_index"][:num_rows], narrow=narrow),
        DecodeRows(num_rows, slot.tables[:num_rows], slot.fields["lengths"][:num_rows], max_tokens),
    )


def unpacked(chunks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A slot's chunks (2 + axes, N) → ids (N,), positions (N,) or where they have several axes (axes, N), write indexes (N,)."""
    return chunks[0], chunks[1] if len(chunks) == 3 else chunks[1:-1], chunks[-1]


def chunk_tokens(slot: Slot, plan: StepPlan) -> tuple[Tensor, StepTokens]:
    """Ids (N,) int64 of the chunks' tokens, and where they stand, without the decode rows."""
    num_tokens = sum([chunk.num_tokens for chunk in plan.chunks])
    ids, positions, writes = unpacked(slot.chunks[:, :num_tokens].long())
    tokens = StepTokens(positions, writes)
    for i, chunk in enumerate(plan.chunks):
        table = slot.chunk_tables[i, : len(chunk.seq.pages)]
        for start, num, prefix in segments_of(chunk.start, chunk.num_tokens, chunk.seq.blocks):
            tokens.prefills.append(PrefillSegment(num, start, prefix, table))
    tokens.spans, tokens.tables = slot.spans[: num_spans(plan.chunks)], slot.chunk_tables
    return ids, tokens
