"""Owns the seam between the step runner and a model family. Decode thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from shared.protocol import ModelCard
from worker.formats.source import ProgressReport, Source
from worker.forward import ImageCrops, KVCache, StateShape, StepTokens

EncodeCrops = Callable[[Tensor], Tensor]
"""(C, S, S, 3) uint8 → (C, num_tokens, width), see `CropEncoder`; of crops of any size (1, H, W, 3) → (1, tokens, width)."""


class CropEncoder(Protocol):
    """The part of a vision encoder that runs over crops of one size, however many pictures they come from; or over one crop
    of any size at a time, where `crop_size` is 0: `num_tokens` are then of a crop of `shared.pictures.LOAD_PIXELS`."""

    crop_size: int
    num_tokens: int  # of one crop
    width: int  # of one token's features
    max_crops: int  # of one picture, the global one included
    dtype: torch.dtype
    progress: Callable[
        [], None
    ]  # called between layers where the host waits for them; set it before `features`

    def features(self, crops: Tensor) -> Tensor:
        """(C, S, S, 3) uint8 → (C, num_tokens, width). Reads nothing on the host, so it can be captured."""
        ...


class Model(Protocol):
    """A loaded model. Every method is called on the decode thread, on the compute stream."""

    card: ModelCard
    num_layers: int  # that attend: with keys and values
    states: StateShape | None  # of layers that keep something else
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype  # what the paged memory holds; may be wider than the weights where that is faster
    kv_dtypes: tuple[torch.dtype, ...]  # what it may hold besides: set `kv_dtype` before memory is made
    device: torch.device
    prefix_tokens: int  # bidirectional prefix of a prompt that carries an image (BOS + image); 0 if none
    num_taps: int  # of decoder layers, the first ones, behind which more features of a picture are added
    weight_bytes: int
    num_weights: int
    biased: bool  # products of its layers add biases, which cuBLAS does in two launches for a single row
    fuses: bool  # forwards go through a GPU's kernels, which read what a step holds on the device

    def page_dtypes(self, device: torch.device) -> tuple[torch.dtype, tuple[torch.dtype, ...]]:
        """What paged memory runs fastest in on `device`, and all that it may hold there."""
        ...

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step of one row reads."""
        ...

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

    def encode_images(self, images: list[ImageCrops], features: EncodeCrops | None = None) -> list[Tensor]:
        """Pictures → one (num_image_tokens, D) tensor of input embeddings each. `features` encodes the crops of all:
        the encoder's own by default, or graphs of it, or crop by crop."""
        ...

    def forward(self, hidden: Tensor, tokens: StepTokens, cache: KVCache) -> Tensor:
        """(N, D) embeddings → (N, D) hidden states before the final norm; writes K and V of all N tokens."""
        ...

    def decode(self, hidden: Tensor, tokens: StepTokens, cache: KVCache) -> tuple[Tensor, Tensor]:
        """`forward`, then `logits` of all its tokens: (N, D) → hidden states (N, D), logits (N, V) fp32."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states of the sampling positions → (R, V) fp32 logits (final norm included)."""
        ...

    def decode_values(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """(R, D) hidden, (R,) int64 sampled ids → (R, 2) fp32: a coordinate id's value in column 0, a size id's
        (width, height), else 0. By argmax over bins, as the reference does. Only for spatial rows."""
        ...

    def score_values(self, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`decode_values`, and (R, 2) fp32 natural log-probabilities of the values' bins, 0 where there is no value."""
        ...


class Load(Protocol):
    """A family's loader: builds the model from what lies on disk. Raises CheckpointError."""

    def __call__(
        self, source: Source, device: torch.device, dtype: torch.dtype, report: ProgressReport
    ) -> Model: ...
