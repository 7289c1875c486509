"""Owns SigLIP 2's NaFlex tower: crops of any size in whole squares, uint8 in, features of squares of patches out. Decode thread.

The layers are those of towers for crops of one size; learned positions are a square table that is stretched or shrunk to each
crop's grid of patches (Tschannen et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shared.pictures import LOAD_PIXELS
from worker.forward import nothing
from worker.models.crop_attention import crop_attention, padded_width
from worker.models.layers import LayerNorm
from worker.models.linear import PackedLinear
from worker.models.vision_tower import TowerBlock, TowerConfig


class FlexTower:
    """Implements `contract.CropEncoder` for crops of any size, those of one call alike.

    `patches` is the product over a patch's pixels, channel last; `table` (G, G, D) the learned positions; `merge` patches along
    a square's side, whose features come joined: row by row within it.
    """

    crop_size = 0

    def __init__(
        self,
        config: TowerConfig,
        max_crops: int,
        patches: PackedLinear,
        table: Tensor,
        blocks: Sequence[TowerBlock],
        norm: LayerNorm,
        merge: int,
    ) -> None:
        self.config, self.max_crops = config, max_crops
        self.dtype, self.width = table.dtype, config.dim
        self.num_tokens = LOAD_PIXELS // config.patch_size**2
        self.progress: Callable[[], None] = nothing
        self._patches, self._table, self._blocks = patches, table, blocks
        self._norm, self._merge = norm, merge
        device, channels = table.device, config.patch_size**2
        std, mean = (torch.tensor(values, device=device) for values in (config.std, config.mean))
        self._scale, self._shift = (1 / (255 * std)).repeat(channels), (mean / std).repeat(channels)
        width = padded_width(device, config.dim // config.num_heads, table.dtype)
        attention = crop_attention(device, config.num_heads, width, table.dtype)
        for block in blocks:
            block.attention = attention

    def pixels(self, crops: Tensor) -> Tensor:
        """(C, H, W, 3) uint8 → (C, patches, P·P·3) fp32, normalised, row by row; a patch is flattened channel last.

        Raises ValueError on sides that are not whole squares.
        """
        (high, wide), patch = self._grid(crops), self.config.patch_size
        cut = crops.view(-1, high, patch, wide, patch, 3).transpose(2, 3)
        return cut.reshape(len(crops), high * wide, -1).float().mul_(self._scale).sub_(self._shift)

    def features(self, crops: Tensor) -> Tensor:
        """(C, H, W, 3) uint8 → (C, squares, merge · merge · D) after the last norm."""
        high, wide = self._grid(crops)
        hidden = self._patches(self.pixels(crops).to(self.dtype))
        hidden = hidden + self._positions(high, wide).to(self.dtype)
        for block in self._blocks:
            hidden = block(hidden)
            self.progress()
        merge = self._merge
        grid = self._norm(hidden).reshape(len(crops), high // merge, merge, wide // merge, merge, -1)
        joined: Tensor = grid.transpose(2, 3).reshape(len(crops), high * wide // merge**2, -1)
        return joined

    def _grid(self, crops: Tensor) -> tuple[int, int]:
        """Patches down and across."""
        unit, patch = self.config.patch_size * self._merge, self.config.patch_size
        high, wide = crops.shape[1:3]
        if not high or not wide or high % unit or wide % unit:
            raise ValueError(f"a crop of {high}×{wide} pixels is not whole squares of {unit}")
        return high // patch, wide // patch

    def _positions(self, high: int, wide: int) -> Tensor:
        """(high · wide, D) fp32: the table by `resampling` along both axes."""
        side = self._table.shape[0]
        down, across = (resampling(side, num, self._table.device) for num in (high, wide))
        rows = torch.tensordot(down, self._table.float(), 1)
        grid: Tensor = torch.tensordot(rows, across, ([1], [1])).transpose(1, 2)
        return grid.flatten(0, 1)


def resampling(source: int, target: int, device: torch.device) -> Tensor:
    """(target, source) fp32 weights that resize an axis bilinearly: of an average where it shrinks, each row's sum 1."""
    scale = source / target
    centres = (torch.arange(target, dtype=torch.float32, device=device) + 0.5) * scale - 0.5
    away = (torch.arange(source, dtype=torch.float32, device=device) - centres[:, None]).abs_()
    weights = (1 - away / max(scale, 1.0)).clamp_(min=0)
    return weights / weights.sum(1, keepdim=True)
