"""Owns what a forward pass is given: its tokens, rows, prefill spans, pictures and KV memory. Decode thread.

A forward runs over the N *flattened* tokens of a step: one for each of `decode.num_rows` decode rows, then the chunks
of the prefill segments in order. All tensors live on the model's device. Token t of a sequence lies in page
`block_table[t // page_tokens]` at offset `t % page_tokens`; page 0 belongs to no sequence: padding writes there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `worker.step.staging` lays out steps without torch
    from torch import Tensor

SPAN_TOKENS = 64
"""Queries that one program of prefill attention takes: a chunk is laid out in spans of so many."""

SPAN_FIELDS = 5
"""Fields of a span: first flattened token, number of queries (0: none), first query's position, bidirectional prefix,
chunk whose block table it reads."""

Span = tuple[int, int, int, int, int]


def segments_of(start: int, num_tokens: int, blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """A chunk of `num_tokens` from position `start` as pieces (start, number of tokens, bidirectional prefix), in order.

    A piece begins with at most one of the blocks that attend both ways, and what follows that is causal: to all of the
    block and before it a prefix is the same, since causal attention sees all that lies before.
    """
    end = start + num_tokens
    inner = [block for block in blocks if block[0] < end and start < block[1]]
    if not inner:
        return [(start, num_tokens, 0)]
    pieces = [] if inner[0][0] <= start else [(start, inner[0][0] - start, 0)]
    stops = [first for first, _ in inner[1:]] + [end]
    for (first, stop), behind in zip(inner, stops, strict=True):
        pieces.append((max(first, start), behind - max(first, start), stop))
    return pieces


def chunk_spans(chunk: int, first: int, num_tokens: int, start: int, prefix: int) -> list[Span]:
    """The spans of the step's chunk number `chunk`: tokens [first, first + num_tokens), at positions from `start`.

    The last span comes first: it sees the most keys, so the short spans fill the gaps at the end.
    """
    offsets = range((num_tokens - 1) // SPAN_TOKENS * SPAN_TOKENS, -1, -SPAN_TOKENS)
    return [(first + i, min(SPAN_TOKENS, num_tokens - i), start + i, prefix, chunk) for i in offsets]


@dataclass(slots=True)
class DecodeRows:
    """The decode rows of a step: one new token each. Shapes may be padded up to a captured bucket."""

    num_rows: int
    block_tables: Tensor  # (B, P) int32: P ≥ pages of the longest row; unused entries are 0
    lengths: Tensor  # (B,) int32: tokens in the cache including the new one; 1 for padding rows
    max_tokens: int  # host bound on `lengths`: attention reads at most this many positions


@dataclass(slots=True)
class PrefillSegment:
    """A chunk of one sequence's prompt: `num_tokens` new positions after `num_context` cached ones."""

    num_tokens: int
    num_context: int
    prefix_tokens: (
        int  # its positions < prefix_tokens attend to each other both ways, and to all before; 0: causal
    )
    block_table: Tensor  # (P,) int32


def check_prefix(chunk: PrefillSegment) -> None:
    """Raise ValueError if the chunk begins and ends inside its prefix: its rows need the whole prefix."""
    num_keys = chunk.num_context + chunk.num_tokens
    if chunk.num_context < chunk.prefix_tokens and num_keys < chunk.prefix_tokens:
        raise ValueError(
            f"a chunk of {chunk.num_tokens} after {chunk.num_context} cuts a prefix of {chunk.prefix_tokens} tokens"
        )


def nothing() -> None:
    """A progress call that does nothing."""


@dataclass(slots=True)
class StepTokens:
    """Where the N flattened tokens of a step stand."""

    # (N,) int64, or (axes, N) where a position has several; where the model runs by kernels, int32 will do, as for `write_index`.
    # Only rotations read them: what a token sees follows from lengths and segments.
    positions: Tensor
    write_index: Tensor  # (N,) int64: page · page_tokens + offset, the cache line each token's K and V go to
    decode: DecodeRows | None = None
    prefills: list[PrefillSegment] = field(default_factory=list)
    # The segments as they lie on the device, so that kernels need no upload of their own; or None. A captured forward has
    # only these: its `prefills` is empty, and tokens outside every span are padding with undefined hidden states.
    spans: Tensor | None = None  # (S, 5) int32, see `chunk_spans`; entries of zeros are empty
    tables: Tensor | None = None  # (C, P) int32, unused entries undefined
    # (first flattened token, (n, taps · D)): what is added to the residual stream of n tokens behind the first layers, D
    # columns a layer.
    taps: list[tuple[int, Tensor]] = field(default_factory=list)
    progress: Callable[[], None] = (
        nothing  # called between layers if the host waits for them, to show that the loop does not hang
    )


def add_taps(hidden: Tensor, taps: Sequence[tuple[int, Tensor]], layer: int) -> None:
    """Add to the residual stream (N, D) behind a layer, in place, what `StepTokens.taps` have for it."""
    dim = hidden.shape[1]
    for first, values in taps:
        own = values[:, layer * dim : (layer + 1) * dim]
        if own.shape[1]:
            hidden[first : first + len(own)] += own


@dataclass(frozen=True, slots=True)
class StateShape:
    """What layers that convolve keep of a sequence: of each the last `num_inputs` inputs, `width` wide."""

    num_layers: int
    num_inputs: int
    width: int


@dataclass(slots=True)
class KVCache:
    """The paged memory of all layers that attend; `keys[l]`, `values[l]`: (num_pages, page_tokens, kv_heads, head_dim)."""

    keys: list[Tensor]
    values: list[Tensor]
    page_tokens: int
    arrivals: Tensor | None = (
        None  # (rows · kv_heads,) int32, all 0 between kernels: of programs that share a head
    )
    states: list[Tensor] = field(default_factory=list)
    """Of each layer that convolves: (num_pages, lines, width), see `worker.models.paged_convolution`."""


@dataclass(slots=True)
class ImageSheet:
    """Pixels (H, W, 3) uint8 on the device, which hold `rows × cols` crops."""

    pixels: Tensor
    rows: int
    cols: int


@dataclass(slots=True)
class ImageCrops:
    """One picture on the device: the sheets that the model's `ImageSpec` cuts it into."""

    sheets: list[ImageSheet]
