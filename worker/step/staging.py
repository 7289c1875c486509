"""Owns the layout of a step's packed inputs and how a plan is written into it. numpy only; decode thread.

One int32 buffer holds everything a step needs on the device, so that it travels in one copy; floats ride in
it bit for bit. Sections stand in the order in which a step needs them: a decode-only step copies a short
prefix of the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.forward import SPAN_FIELDS, SPAN_TOKENS, chunk_spans, segments_of
from worker.schedule.life import MaskLife
from worker.schedule.plan import Chunk, StepPlan
from worker.schedule.rng import uniforms
from worker.schedule.rotary_places import places_of
from worker.schedule.sequence import Sequence

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

INT_FIELDS = (
    "rows",  # decode rows, then padding
    "positions",
    "lengths",
    "write_index",
    "spatial",
    "graph_rows",  # rows whose token a captured step samples itself: decode rows; padding for those sampled behind it
    "sample_rows",  # rows that get a token: decode rows, then rows whose prefill ends
    "sample_index",  # where each sample's hidden state stands among the flattened tokens
    "top_k",
)
FLOAT_FIELDS = ("temperature", "top_p", "min_p", "uniform", "presence", "frequency", "repetition", "ban_stop")
FIELDS = INT_FIELDS + FLOAT_FIELDS
NOTHING: tuple[list[int], int] = ([], 0)
NO_MASK = MaskLife.NONE
LEAST_BLOCK = 4  # positions of a block that attends both ways, besides a prompt's first


def needs_eager(seq: Sequence) -> bool:
    """Whether no captured step can sample this row: penalties and biases, log-probabilities, a mask from the host."""
    return seq.is_adjusted or seq.sampling.num_logprobs >= 0 or seq.mask is not NO_MASK


def is_plain(seq: Sequence) -> bool:
    """Whether any captured step can sample this row: words only, without constraint."""
    return not (needs_eager(seq) or seq.table_place or seq.is_spatial)


def num_spans(chunks: list[Chunk]) -> int:
    """Spans of a step's chunks."""
    return sum(
        [
            -(-num // SPAN_TOKENS)
            for chunk in chunks
            for _, num, _ in segments_of(chunk.start, chunk.num_tokens, chunk.seq.blocks)
        ]
    )


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a worker, made once at start-up: of its slots and memory, and where things lie in a slot's buffer."""

    max_rows: int
    max_sequence_tokens: int
    step_tokens: int
    page_tokens: int
    num_pages: int
    vocab_size: int
    num_slots: int = 2
    step_crops: int = 26  # of pictures, as the scheduler bounds them; one picture may have more
    max_logprobs: int = 20
    position_axes: int = 1  # of a chunk's tokens, which are rotated by them

    @property
    def max_pages(self) -> int:
        """Of one sequence: the width of a block table."""
        return -(-self.max_sequence_tokens // self.page_tokens)

    @property
    def tables_start(self) -> int:
        """Where the decode rows' block tables begin, in int32 words."""
        return len(FIELDS) * self.max_rows

    @property
    def chunks_start(self) -> int:
        """Where the prefill chunks' ids, positions and write indexes begin."""
        return self.tables_start + self.max_rows * self.max_pages

    @property
    def chunk_tokens(self) -> int:
        """Prefill tokens of one step. A prefix that overdraws the mixed budget still fits."""
        return self.step_tokens + self.max_rows

    @property
    def chunk_fields(self) -> int:
        """Of a chunk's token: its id, its position on each axis, its write index."""
        return 2 + self.position_axes

    @property
    def max_spans(self) -> int:
        """Spans of one step: each chunk's last may be short, and that before a block that attends both ways."""
        return self.chunk_tokens // SPAN_TOKENS + self.chunk_tokens // LEAST_BLOCK + self.max_rows

    @property
    def ends_start(self) -> int:
        """Where the fields of rows whose prefill ends are kept while padding takes their places."""
        return self.chunks_start + self.chunk_fields * self.chunk_tokens

    @property
    def spans_start(self) -> int:
        """Where the chunks' spans begin."""
        return self.ends_start + len(FIELDS) * self.max_rows

    @property
    def chunk_tables_start(self) -> int:
        """Where the chunks' block tables begin."""
        return self.spans_start + SPAN_FIELDS * self.max_spans

    @property
    def num_words(self) -> int:
        """Size of the packed buffer."""
        return self.chunk_tables_start + self.max_rows * self.max_pages

    @property
    def mask_words(self) -> int:
        """int32 words of one row's bit mask over the vocabulary."""
        return (self.vocab_size + 31) // 32


class Views:
    """Numpy views of one packed buffer's sections."""

    __slots__ = (
        "buffer",
        "chunk_tables",
        "chunks",
        "deferred",
        "draws",
        "ends",
        "floats",
        "held",
        "ints",
        "rows",
        "samples",
        "sections",
        "shape",
        "spans",
        "tables",
    )

    def __init__(self, buffer: I32, shape: StepShape) -> None:
        self.buffer = buffer
        self.shape = shape
        rows, pages = shape.max_rows, shape.max_pages
        self.sections: I32 = buffer[: shape.tables_start].reshape(len(FIELDS), rows)
        sections = self.sections
        self.ints: dict[str, I32] = {name: sections[i] for i, name in enumerate(FIELDS)}
        self.floats: dict[str, F32] = {name: self.ints[name].view(np.float32) for name in FLOAT_FIELDS}
        self.tables: I32 = buffer[shape.tables_start : shape.chunks_start].reshape(rows, pages)
        self.chunks: I32 = buffer[shape.chunks_start : shape.ends_start].reshape(
            shape.chunk_fields, shape.chunk_tokens
        )
        self.ends: I32 = buffer[shape.ends_start : shape.spans_start].reshape(len(FIELDS), rows)
        self.spans: I32 = buffer[shape.spans_start : shape.chunk_tables_start].reshape(-1, SPAN_FIELDS)
        self.chunk_tables: I32 = buffer[shape.chunk_tables_start :].reshape(rows, pages)
        # What the buffer holds from the step before.
        self.held = [NOTHING] * rows  # of each decode row: the page list in its table, and how much of it
        self.samples: list[Sequence] = []
        self.rows: list[int] = []  # the rows of `samples`, because a resumed sequence may have another row
        self.deferred: list[
            int
        ] = []  # rows are masked by the host for a while only, where a thought's budget ends
        self.draws = False


def used_words(plan: StepPlan, shape: StepShape, padded_rows: int) -> int:
    """How much of the buffer a step needs on the device."""
    if plan.chunks:
        return shape.chunk_tables_start + len(plan.chunks) * shape.max_pages
    return shape.tables_start + padded_rows * shape.max_pages


def stage_rows(views: Views, plan: StepPlan) -> None:
    """Write the decode rows' inputs and every sample's sampling parameters.

    A slot gets the same rows step after step, so fields that the buffer holds already are not written again.
    """
    ints, tables = views.ints, views.tables
    page_tokens = views.shape.page_tokens
    num_rows, num = len(plan.decode), len(plan.samples)
    rows = [seq.row for seq in plan.samples]
    is_same = (
        num == num_rows
        and rows == views.rows
        and plan.samples == views.samples
        and plan.deferred == views.deferred
    )
    views.rows, views.samples, views.deferred = rows, plan.samples if num == num_rows else [], plan.deferred
    if num_rows:
        positions = plan.positions
        ints["positions"][:num_rows] = positions
        ints["lengths"][:num_rows] = ints["positions"][:num_rows] + 1
        ints["write_index"][:num_rows] = [
            seq.pages[p // page_tokens] * page_tokens + p % page_tokens
            for seq, p in zip(plan.decode, positions, strict=True)
        ]
        if views.shape.position_axes > 1:
            ints["positions"][:num_rows] += [seq.rotary_shift for seq in plan.decode]
        held = views.held
        for i, seq in enumerate(plan.decode):
            pages, (shown, num_shown) = seq.pages, held[i]
            num_pages = len(pages)
            if pages is not shown:
                num_shown = 0
            if num_shown != num_pages:
                tables[i, num_shown:num_pages] = pages[num_shown:]
                held[i] = (pages, num_pages)
    if not is_same:
        ints["rows"][:num_rows] = rows[:num_rows]
        ints["spatial"][:num_rows] = [seq.is_spatial for seq in plan.decode]
        ints["graph_rows"][:num_rows] = rows[:num_rows]
        if any([needs_eager(seq) for seq in plan.decode]):
            apart = [i for i, seq in enumerate(plan.decode) if not is_plain(seq)]
            ints["graph_rows"][apart] = views.shape.max_rows
        ints["sample_rows"][:num] = rows
    _stage_sampling(views, plan, num, is_same=is_same)


def _stage_sampling(views: Views, plan: StepPlan, num: int, *, is_same: bool) -> None:
    ints, floats = views.ints, views.floats
    settings = [seq.sampling for seq in plan.samples]
    if not is_same:
        views.draws = any([s.temperature > 0 for s in settings])
        floats["temperature"][:num] = [s.temperature for s in settings]  # read whether or not a row draws
        if views.draws:
            floats["top_p"][:num] = [s.top_p for s in settings]
            floats["min_p"][:num] = [s.min_p for s in settings]
            ints["top_k"][:num] = [s.top_k for s in settings]
    if views.draws:
        floats["uniform"][:num] = uniforms([s.seed for s in settings], plan.sample_indexes)
    if plan.any_adjusted:
        floats["presence"][:num] = [s.presence_penalty for s in settings]
        floats["frequency"][:num] = [s.frequency_penalty for s in settings]
        floats["repetition"][:num] = [s.repetition_penalty for s in settings]
        floats["ban_stop"][:num] = [
            index < s.min_tokens for s, index in zip(settings, plan.sample_indexes, strict=True)
        ]


def stage_padding(views: Views, start: int, end: int) -> None:
    """Make rows [start, end) padding: they read one position of page 0 and write there."""
    ints = views.ints
    ints["rows"][start:end] = views.shape.max_rows
    ints["graph_rows"][start:end] = views.shape.max_rows
    ints["sample_rows"][start:end] = views.shape.max_rows
    ints["lengths"][start:end] = 1
    for name in ("positions", "write_index", "spatial", "top_k"):
        ints[name][start:end] = 0
    views.floats["temperature"][start:end] = 0
    views.tables[start:end] = 0
    views.held[start:end] = [NOTHING] * (end - start)
    if start < len(views.samples):
        views.samples = []


def stage_ends(views: Views, start: int, end: int) -> None:
    """Put the fields of samples [start, end) aside, before padding is written over them."""
    views.ends[:, : end - start] = views.sections[:, start:end]


def stage_chunks(views: Views, plan: StepPlan, *, alone: bool = False) -> None:
    """Write the prefill chunks' inputs: behind the decode rows, or `alone` as a forward of their own."""
    ids, positions, writes = views.chunks[0], views.chunks[1:-1], views.chunks[-1]
    page_tokens = views.shape.page_tokens
    at, at_span, sample = 0, 0, len(plan.decode)
    flat = 0 if alone else sample
    where = views.ints["sample_index"]
    if flat:
        where[:flat] = np.arange(flat)
    for i, chunk in enumerate(plan.chunks):
        seq, start, num = chunk.seq, chunk.start, chunk.num_tokens
        pages = np.asarray(seq.pages, dtype=np.int32)
        own = np.arange(start, start + num, dtype=np.int32)
        ids[at : at + num] = seq.tokens[start : start + num]
        positions[:, at : at + num] = own if seq.rotary is None else places_of(seq, start, start + num)
        writes[at : at + num] = pages[own // page_tokens] * page_tokens + own % page_tokens
        own_flat = flat
        for piece_start, piece_num, prefix in segments_of(start, num, seq.blocks):
            spans = chunk_spans(i, own_flat, piece_num, piece_start, prefix)
            views.spans[at_span : at_span + len(spans)] = spans
            at_span += len(spans)
            own_flat += piece_num
        views.chunk_tables[i, : len(pages)] = pages
        at += num
        flat += num
        if chunk.is_last:
            where[sample] = flat - 1
            sample += 1


def stage_chunk_padding(views: Views, chunks: list[Chunk], tokens: int, spans: int) -> None:
    """Fill up the sections of `chunks` to so many tokens and spans: the tokens write to page 0 and nobody reads them."""
    views.chunks[:, sum([chunk.num_tokens for chunk in chunks]) : tokens] = 0
    views.spans[num_spans(chunks) : spans] = 0
