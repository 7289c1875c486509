"""Owns Moondream's vision encoder: crops in, input embeddings of the language model out. Decode thread."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.contract import ImageCrops
from worker.models.layers import Take, take_linear, take_mlp, take_norm
from worker.models.moondream_config import VisionConfig
from worker.models.tiling import cut_crops, stitch_rows


class VisionEncoder:
    """Pictures → input embeddings of the language model."""

    def __init__(self, config: VisionConfig, take: Take) -> None:
        self._config = config
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
        self._dtype = self._pos_emb.dtype
        self._kept = lru_cache(maxsize=64)(self._kept_index)

    def encode(self, images: list[ImageCrops]) -> list[Tensor]:
        """Pictures → one (num_tokens, proj_out_dim) tensor each; the crops of all run as one batch.

        A picture of one tile is encoded once: its canvas is its global crop, pixel for pixel. Raises ValueError
        for a picture whose frames do not fit its tiling.
        """
        config = self._config
        margin = 2 * config.overlap_margin * config.enc_patch_size
        crops = [cut_crops(image, config.crop_size, margin) for image in images]
        crops = [own[:1] if own.shape[0] == 2 else own for own in crops]
        features = self.features(torch.cat(crops))
        joined = []
        for image, own in zip(images, torch.split(features, [len(own) for own in crops]), strict=True):
            local = own[0] if len(own) == 1 else self._pool(own[1:], image.tiles_h, image.tiles_w)
            joined.append(torch.cat([own[0], local], dim=-1))
        return list(self._proj_mlp(torch.stack(joined)).unbind(0))

    def features(self, crops: Tensor) -> Tensor:
        """(C, S, S, 3) uint8 crops → (C, num_tokens, enc_dim) features after the final norm."""
        config = self._config
        grid, patch = config.grid, config.enc_patch_size
        # A patch is flattened channel first.
        patches = crops.view(-1, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4)
        pixels = patches.reshape(-1, config.num_tokens, 3 * patch * patch).float()
        hidden = self._patch_emb(pixels.mul_(1 / 127.5).sub_(1.0).to(self._dtype)) + self._pos_emb
        for block in self._blocks:
            hidden = block(hidden)
        return self._post_ln(hidden)

    def _pool(self, tiles: Tensor, tiles_h: int, tiles_w: int) -> Tensor:
        """(tiles, num_tokens, C) local features → (num_tokens, C): stitched, margins dropped, pooled."""
        grid, dim = self._config.grid, tiles.shape[-1]
        sheet = tiles.view(tiles_h, tiles_w, grid, grid, dim).transpose(1, 2)
        sheet = sheet.reshape(tiles_h * grid, tiles_w * grid, dim)
        sheet = sheet.index_select(0, self._kept(tiles_h, tiles.device))
        sheet = sheet.index_select(1, self._kept(tiles_w, tiles.device))
        pooled = F.adaptive_avg_pool2d(sheet.permute(2, 0, 1), (grid, grid))
        return pooled.permute(1, 2, 0).reshape(grid * grid, dim)

    def _kept_index(self, tiles: int, device: torch.device) -> Tensor:
        return torch.tensor(stitch_rows(tiles, self._config.grid, self._config.overlap_margin), device=device)


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
        crops, tokens, dim = hidden.shape
        qkv = self._qkv(self._ln1(hidden)).view(crops, tokens, 3, self._num_heads, dim // self._num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(crops, tokens, dim)
        hidden = self._proj.add(mixed, hidden)
        return self._mlp.add(self._ln2(hidden), hidden)
