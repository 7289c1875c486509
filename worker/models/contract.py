"""Owns the seam between the step runner and a model family: what a forward is given. Decode thread.

A forward runs over the *flattened* tokens of one step: first one token for each of `decode.num_rows` decode
rows, then the chunks of the prefill segments, in order. N is their sum. All tensors live on the model's device.

KV memory of a layer is two tensors `(num_pages, page_tokens, kv_heads, head_dim)`; token t of a sequence
lives in page `block_table[t // page_tokens]` at offset `t % page_tokens`. Page 0 belongs to no sequence:
padding rows write there and nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shared.protocol import ModelCard


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
    prefix_tokens: int  # positions < prefix_tokens attend to each other both ways (image prefix); 0: causal
    block_table: Tensor  # (P,) int32


def check_prefix(chunk: PrefillSegment) -> None:
    """Raise ValueError when the chunk ends inside a prefix that it also begins in: its rows need all of that."""
    num_keys = chunk.num_context + chunk.num_tokens
    if chunk.num_context < chunk.prefix_tokens and num_keys < chunk.prefix_tokens:
        raise ValueError(
            f"a chunk of {chunk.num_tokens} after {chunk.num_context} cuts a prefix of {chunk.prefix_tokens} tokens"
        )


@dataclass(slots=True)
class StepTokens:
    """Where the N flattened tokens of a step stand."""

    positions: Tensor  # (N,) int64
    write_index: Tensor  # (N,) int64: page · page_tokens + offset, the cache line each token's K and V go to
    decode: DecodeRows | None = None
    prefills: list[PrefillSegment] = field(default_factory=list)
    # The segments as they lie on the device, so that kernels need no upload of their own; or None. A captured forward
    # has nothing else: its `prefills` is empty, and tokens of no span are padding, whose hidden states are anything.
    spans: Tensor | None = None  # (S, 5) int32, see `worker.staging.chunk_spans`; entries of zeros are empty
    tables: Tensor | None = None  # (C, P) int32, unused entries anything


@dataclass(slots=True)
class KVCache:
    """The paged memory of all layers; `keys[l]`, `values[l]`: (num_pages, page_tokens, kv_heads, head_dim)."""

    keys: list[Tensor]
    values: list[Tensor]
    page_tokens: int


@dataclass(slots=True)
class ImageCrops:
    """One picture on the device: `global_crop` (S, S, 3) uint8, `canvas` (H, W, 3) uint8, cut into tiles."""

    global_crop: Tensor
    canvas: Tensor
    tiles_h: int
    tiles_w: int


class CropEncoder(Protocol):
    """The part of a vision encoder that runs over crops of one size, however many pictures they come from."""

    crop_size: int
    num_tokens: int  # of one crop
    width: int  # of one token's features
    max_crops: int  # of one picture, the global one included
    dtype: torch.dtype
    run: Callable[[Tensor], Tensor]  # what the encoder itself calls: `features`, or graphs of it

    def features(self, crops: Tensor) -> Tensor:
        """(C, S, S, 3) uint8 → (C, num_tokens, width). Reads nothing on the host, so it can be captured."""
        ...


class Model(Protocol):
    """A loaded model. Every method is called on the decode thread, on the compute stream."""

    card: ModelCard
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype  # what the paged memory holds; may be wider than the weights where that is faster
    device: torch.device
    prefix_tokens: int  # bidirectional prefix of a prompt that carries an image (BOS + image); 0 if none
    weight_bytes: int
    fuses: bool  # forwards go through a GPU's kernels, which read what a step holds on the device

    @property
    def encoder(self) -> CropEncoder | None:
        """The vision encoder, of a model that reads pictures."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """(N,) int64 ids → (N, D) input embeddings."""
        ...

    def embed_next(self, token_ids: Tensor, values: Tensor, spatial: Tensor) -> Tensor:
        """Embed freshly sampled tokens: (B,) ids, (B, 2) fp32 values, (B,) bool → (B, D).

        Where `spatial` holds and the id is the coordinate (size) id, the row's value(s) go through the
        coordinate (size) encoder in place of the word embedding. Families without a region model ignore both.
        """
        ...

    def encode_images(self, images: list[ImageCrops]) -> list[Tensor]:
        """Pictures → one (num_image_tokens, D) tensor of input embeddings each; crops of all in one batch."""
        ...

    def forward(self, hidden: Tensor, tokens: StepTokens, cache: KVCache) -> Tensor:
        """(N, D) embeddings → (N, D) hidden states before the final norm; writes K and V of all N tokens."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states of the sampling positions → (R, V) fp32 logits (final norm included)."""
        ...

    def decode_values(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """(R, D) hidden, (R,) int64 sampled ids → (R, 2) fp32: a coordinate id's value in column 0, a size id's
        (width, height), else 0. By argmax over bins, as the reference does. Only for spatial rows."""
        ...


class Load(Protocol):
    """A family's loader: builds the model from a checkpoint folder."""

    def __call__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, report: ProgressReport
    ) -> Model: ...


class ProgressReport(Protocol):
    """Told how far a long start-up phase is; prints a bar where a person watches."""

    def __call__(self, phase: str, done: float, total: float) -> None: ...
