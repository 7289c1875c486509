"""Owns Moondream's vision encoder: crops in, input embeddings of the language model out. Decode thread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.forward import ImageCrops
from worker.models.contract import EncodeCrops
from worker.models.layers import take_linear, take_mlp, take_norm
from worker.models.linear import Take, TakeWeight
from worker.models.moondream_config import VisionConfig
from worker.models.tiling import cut_crops, stitch_rows
from worker.models.vision_tower import Tower, TowerBlock, TowerConfig


class VisionEncoder(Tower):
    """Pictures → input embeddings of the language model; implements `contract.CropEncoder`."""

    def __init__(self, config: VisionConfig, take: Take, take_weight: TakeWeight | None = None) -> None:
        self._vision = config
        dim, ff_dim = config.enc_dim, config.enc_ff_dim
        sizes = TowerConfig(
            crop_size=config.crop_size,
            patch_size=config.enc_patch_size,
            dim=dim,
            ff_dim=ff_dim,
            num_layers=config.enc_n_layers,
            num_heads=config.enc_n_heads,
            eps=1e-5,
        )
        patches = take_linear(take, "vision.patch_emb", 3 * config.enc_patch_size**2, dim)
        positions = take("vision.pos_emb", 1, config.num_tokens, dim)
        blocks = [
            _block(take, take_weight, f"vision.blocks.{index}", sizes) for index in range(config.enc_n_layers)
        ]
        norm = take_norm(take, "vision.post_ln", dim)
        # Attention by torch: its answers are held to the last bit.
        super().__init__(sizes, 1 + config.max_crops, patches, positions, blocks, norm, compiled=False)
        self._proj_mlp = take_mlp(
            take, "vision.proj_mlp", 2 * dim, config.proj_inner_dim, config.proj_out_dim, take_weight
        )
        # Made now: on a GPU each would hold the host for its upload.
        self._kept = [self._kept_index(tiles, positions.device) for tiles in range(1 + config.max_crops)]

    def encode(self, images: list[ImageCrops], features: EncodeCrops) -> list[Tensor]:
        """Pictures → one (num_tokens, proj_out_dim) tensor each; `features` encodes the crops of all.

        A picture of one tile is encoded once: its canvas is its global crop, pixel for pixel. Raises ValueError
        for a picture whose frames do not fit its tiling.
        """
        config = self._vision
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

    def _pool(self, tiles: Tensor, tiles_h: int, tiles_w: int) -> Tensor:
        """(tiles, num_tokens, C) local features → (num_tokens, C): stitched, margins dropped, pooled."""
        grid, dim = self._vision.grid, tiles.shape[-1]
        sheet = tiles.view(tiles_h, tiles_w, grid, grid, dim).transpose(1, 2)
        sheet = sheet.reshape(tiles_h * grid, tiles_w * grid, dim)
        sheet = sheet.index_select(0, self._kept[tiles_h])
        sheet = sheet.index_select(1, self._kept[tiles_w])
        pooled = F.adaptive_avg_pool2d(sheet.permute(2, 0, 1), (grid, grid))
        return pooled.permute(1, 2, 0).reshape(grid * grid, dim)

    def _kept_index(self, tiles: int, device: torch.device) -> Tensor:
        kept = stitch_rows(tiles, self._vision.grid, self._vision.overlap_margin)
        return torch.tensor(kept, dtype=torch.int64, device=device)


def _block(take: Take, take_weight: TakeWeight | None, name: str, sizes: TowerConfig) -> TowerBlock:
    dim = sizes.dim
    return TowerBlock(
        take_norm(take, f"{name}.ln1", dim),
        take_linear(take, f"{name}.attn.qkv", dim, 3 * dim, take_weight),
        take_linear(take, f"{name}.attn.proj", dim, dim, take_weight),
        take_norm(take, f"{name}.ln2", dim),
        take_mlp(take, f"{name}.mlp", dim, sizes.ff_dim, dim, take_weight),
        sizes.num_heads,
    )
