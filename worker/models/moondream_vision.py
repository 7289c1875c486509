"""Owns Moondream's vision encoder: crops in, input embeddings of the language model out. Decode thread."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from worker.forward import ImageCrops
from worker.models.contract import EncodeCrops
from worker.models.layers import Take, take_linear, take_mlp, take_norm
from worker.models.moondream_config import VisionConfig
from worker.models.tiling import cut_crops, stitch_rows

ATTENTION: SDPBackend | None = None
"""The backend of attention on a GPU; None: torch's choice, which is cuDNN's on Hopper with torch 2.11, not FlashAttention.
`loadtest.gpu.vision` times both and compares them with fp32 arithmetic: pin the quicker of those that are right."""


class VisionEncoder:
    """Pictures → input embeddings of the language model; implements `contract.CropEncoder`.

    `fuses`: norms with their residual sums and activations are a GPU's kernels (`worker.kernels`).
    """

    def __init__(self, config: VisionConfig, take: Take) -> None:
        self._config = config
        self.crop_size, self.num_tokens, self.width = config.crop_size, config.num_tokens, config.enc_dim
        self.max_crops = 1 + config.max_crops
        dim, ff_dim = config.enc_dim, config.enc_ff_dim
        self._patch_emb = take_linear(take, "vision.patch_emb", 3 * config.enc_patch_size**2, dim)
        self._pos_emb = take("vision.pos_emb", 1, config.num_tokens, dim)
        self._blocks = [
            _VisionBlock(take, f"vision.blocks.{index}", dim, ff_dim, config.enc_n_heads)
            for index in range(config.enc_n_layers)
        ]
        self._post_ln = take_norm(take, "vision.post_ln", dim)
        self._proj_mlp = take_mlp(
            take, "vision.proj_mlp", 2 * dim, config.proj_inner_dim, config.proj_out_dim
        )
        self.dtype = self._pos_emb.dtype
        self.fuses = self._pos_emb.device.type == "cuda"
        # Made now: on a GPU each would hold the host for its upload.
        self._kept = [self._kept_index(tiles) for tiles in range(1 + config.max_crops)]

    def encode(self, images: list[ImageCrops], features: EncodeCrops) -> list[Tensor]:
        """Pictures → one (num_tokens, proj_out_dim) tensor each; `features` encodes the crops of all.

        A picture of one tile is encoded once: its canvas is its global crop, pixel for pixel. Raises ValueError
        for a picture whose frames do not fit its tiling.
        """
        config = self._config
        margin = 2 * config.overlap_margin * config.enc_patch_size
        crops = [cut_crops(image, config.crop_size, margin) for image in images]
        crops = [own[:1] if own.shape[0] == 2 else own for own in crops]
        encoded = features(torch.cat(crops))
        joined = []
        for image, own in zip(images, torch.split(encoded, [len(own) for own in crops]), strict=True):
            tiles = image.sheets[-1]
            local = own[0] if len(own) == 1 else self._pool(own[1:], tiles.rows, tiles.cols)
            joined.append(torch.cat([own[0], local], dim=-1))
        return list(self._proj_mlp(torch.stack(joined)).unbind(0))

    def features(self, crops: Tensor) -> Tensor:
        """(C, S, S, 3) uint8 crops → (C, num_tokens, enc_dim) features after the final norm."""
        config = self._config
        grid, patch = config.grid, config.enc_patch_size
        # A patch is flattened channel first.
        patches = crops.view(-1, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4)
        pixels = patches.reshape(-1, config.num_tokens, 3 * patch * patch).float()
        hidden = self._patch_emb(pixels.mul_(1 / 127.5).sub_(1.0).to(self.dtype)) + self._pos_emb
        if self.fuses:
            return self._features_fused(hidden)
        for block in self._blocks:
            hidden = block(hidden)
        return self._post_ln(hidden)

    def _features_fused(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape
        hidden = hidden.view(-1, shape[2])
        gained: Tensor | None = None
        for block in self._blocks:
            hidden, gained = block.fused(hidden, gained, shape[0])
        return self._post_ln.fused(hidden, gained)[1].view(shape)

    def _pool(self, tiles: Tensor, tiles_h: int, tiles_w: int) -> Tensor:
        """(tiles, num_tokens, C) local features → (num_tokens, C): stitched, margins dropped, pooled."""
        grid, dim = self._config.grid, tiles.shape[-1]
        sheet = tiles.view(tiles_h, tiles_w, grid, grid, dim).transpose(1, 2)
        sheet = sheet.reshape(tiles_h * grid, tiles_w * grid, dim)
        sheet = sheet.index_select(0, self._kept[tiles_h])
        sheet = sheet.index_select(1, self._kept[tiles_w])
        pooled = F.adaptive_avg_pool2d(sheet.permute(2, 0, 1), (grid, grid))
        return pooled.permute(1, 2, 0).reshape(grid * grid, dim)

    def _kept_index(self, tiles: int) -> Tensor:
        kept = stitch_rows(tiles, self._config.grid, self._config.overlap_margin)
        return torch.tensor(kept, dtype=torch.int64, device=self._pos_emb.device)


class _VisionBlock:
    """One pre-norm transformer layer with full attention within each crop."""

    def __init__(self, take: Take, name: str, dim: int, ff_dim: int, num_heads: int) -> None:
        self._num_heads = num_heads
        self._ln1 = take_norm(take, f"{name}.ln1", dim)
        self._qkv = take_linear(take, f"{name}.attn.qkv", dim, 3 * dim)
        self._proj = take_linear(take, f"{name}.attn.proj", dim, dim)
        self._ln2 = take_norm(take, f"{name}.ln2", dim)
        self._mlp = take_mlp(take, f"{name}.mlp", dim, ff_dim, dim)

    def __call__(self, hidden: Tensor) -> Tensor:
        mixed = self._attend(self._qkv(self._ln1(hidden)), hidden.shape[0]).view(hidden.shape)
        hidden = self._proj.add(mixed, hidden)
        return self._mlp.add(self._ln2(hidden), hidden)

    def fused(self, hidden: Tensor, gained: Tensor | None, crops: int) -> tuple[Tensor, Tensor]:
        """As `__call__` over the flattened tokens of all crops, (C·T, D), with a GPU's kernels. `gained` is what the
        block before adds to the residual stream; returns the stream, and what this block's MLP adds to it."""
        from worker.kernels.activation import gelu_tanh  # here, so that no CPU worker imports Triton

        hidden, normed = self._ln1.fused(hidden, gained)
        mixed = self._attend(self._qkv(normed), crops)
        hidden, normed = self._ln2.fused(self._proj(mixed), hidden)
        return hidden, self._mlp.fc2(gelu_tanh(self._mlp.fc1(normed)))

    def _attend(self, qkv: Tensor, crops: int) -> Tensor:
        """(C, T, 3·D) or (C·T, 3·D) → (C·T, D)."""
        dim = qkv.shape[-1] // 3
        split = qkv.view(crops, -1, 3, self._num_heads, dim // self._num_heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        with attention_backend(qkv.device):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, dim)


def attention_backend(device: torch.device) -> AbstractContextManager[None]:
    """For a block: the backend that `ATTENTION` pins on a GPU."""
    if ATTENTION is None or device.type != "cuda":
        return nullcontext()
    pinned: AbstractContextManager[None] = sdpa_kernel(ATTENTION)
    return pinned
