"""Owns Moondream's region model: numbers in, numbers out, for points and boxes. Decode thread.

A coordinate or a size is generated as one token whose value is decoded from the hidden state; the next input is
that value's Fourier features in place of a word embedding. Values are those of the reference: bin/1024 for a
coordinate, 2^(bin/1023·10 − 10) for a width or height, neither clamped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from worker.models.layers import take_linear, take_mlp, take_norm
from worker.models.linear import Take
from worker.models.moondream_config import RegionConfig


class RegionModel:
    """Encoders and decoders of coordinates and sizes. Fourier features are computed in fp32 in every dtype, because
    their phases reach hundreds of radians."""

    def __init__(self, config: RegionConfig, take: Take) -> None:
        dim, inner = config.dim, config.inner_dim
        float32 = torch.float32
        coord_features = take("region.coord_features", 1, config.coord_feat_dim // 2, dtype=float32)
        size_features = take("region.size_features", 2, config.size_feat_dim // 2, dtype=float32)
        self._coord_features = coord_features * (2 * math.pi)
        self._size_features = size_features * (2 * math.pi)
        self._coord_encoder = take_linear(take, "region.coord_encoder", config.coord_feat_dim, dim)
        self._size_encoder = take_linear(take, "region.size_encoder", config.size_feat_dim, dim)
        # One norm for both decoders, in Moondream 3.
        self._norm = take_norm(take, "region.ln", dim) if config.use_ln else None

        def decoder(name: str, outputs: int) -> Callable[[Tensor], Tensor]:
            if config.decoder_arch == "linear":
                return take_linear(take, name, dim, outputs)
            return take_mlp(take, name, dim, inner, outputs)

        self._coord_decoder = decoder("region.coord_decoder", config.coord_out_dim)
        self._size_decoder = decoder("region.size_decoder", config.size_out_dim)

    def encode_coordinate(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(R, 1) fp32 values → (R, D) embeddings of `dtype`."""
        return self._coord_encoder(_fourier(value, self._coord_features).to(dtype))

    def encode_size(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(R, 2) fp32 widths and heights → (R, D) embeddings of `dtype`."""
        return self._size_encoder(_fourier(values, self._size_features).to(dtype))

    def coordinate_logits(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states → (R, coordinate bins) fp32."""
        return self._coord_decoder(self._normed(hidden)).float()

    def size_logits(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states → (R, 2, size bins) fp32: width, height."""
        return self._size_decoder(self._normed(hidden)).float().view(hidden.shape[0], 2, -1)

    def _normed(self, hidden: Tensor) -> Tensor:
        return hidden if self._norm is None else self._norm(hidden)

    def decode_coordinate(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states → (R, 1) fp32: the most likely bin over the number of bins."""
        logits = self.coordinate_logits(hidden)
        return logits.max(-1, keepdim=True).indices.float() / logits.shape[-1]

    def decode_size(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states → (R, 2) fp32 width and height, on a logarithmic scale from 2⁻¹⁰ to 1."""
        logits = self.size_logits(hidden)
        bins = logits.max(-1).indices.float()
        return torch.exp2(bins / (logits.shape[-1] - 1) * 10.0 - 10.0)

    def score_coordinate(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states → (R, 1) fp32: the log-probability of the bin that `decode_coordinate` takes."""
        return _most_likely(self.coordinate_logits(hidden)).unsqueeze(-1)

    def score_size(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden states → (R, 2) fp32: those of the bins that `decode_size` takes."""
        return _most_likely(self.size_logits(hidden))


def _most_likely(logits: Tensor) -> Tensor:
    """(…, bins) → (…): the largest log-probability."""
    return logits.max(-1).values - logits.logsumexp(-1)


def _fourier(values: Tensor, frequencies: Tensor) -> Tensor:
    """(R, n) values, (n, F) angular frequencies → (R, 2F). Sums written out: a matrix product of this shape gives a
    row other bits in other batches."""
    phases = values[:, :1] * frequencies[0]
    for column in range(1, frequencies.shape[0]):
        phases = torch.addcmul(phases, values[:, column : column + 1], frequencies[column])
    return torch.cat([phases.cos(), phases.sin()], dim=-1)
