"""Owns the device's side of tiling: cutting a canvas into overlapping crops, and undoing it. Decode thread."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.forward import ImageCrops


def cut_crops(image: ImageCrops, crop_size: int, margin: int) -> Tensor:
    """One picture → (1 + tiles, S, S, 3) uint8 on the device: the global crop, then the tiles row by row.

    Neighbouring tiles share `margin` pixels (both sides together). Raises ValueError when the canvas or the
    global crop is not of the size that the tiling asks for.
    """
    window = crop_size - margin
    height, width = image.tiles_h * window + margin, image.tiles_w * window + margin
    if image.canvas.shape != (height, width, 3) or image.global_crop.shape != (crop_size, crop_size, 3):
        raise ValueError(
            f"{image.tiles_h}×{image.tiles_w} tiles need a canvas of {height}×{width} and a global crop of "
            f"{crop_size}×{crop_size}, not {tuple(image.canvas.shape)} and {tuple(image.global_crop.shape)}"
        )
    crops = torch.empty(
        1 + image.tiles_h * image.tiles_w,
        crop_size,
        crop_size,
        3,
        dtype=torch.uint8,
        device=image.canvas.device,
    )
    crops[0] = image.global_crop
    tiles = image.canvas.unfold(0, crop_size, window).unfold(1, crop_size, window)
    crops[1:].view(image.tiles_h, image.tiles_w, crop_size, crop_size, 3).copy_(tiles.permute(0, 1, 3, 4, 2))
    return crops


def stitch_rows(tiles: int, grid: int, margin: int) -> list[int]:
    """Which of `tiles · grid` feature rows to keep, in order: interior margins belong to the neighbour's middle."""
    kept: list[int] = []
    for tile in range(tiles):
        first = 0 if tile == 0 else margin
        last = grid if tile == tiles - 1 else grid - margin
        kept.extend(range(tile * grid + first, tile * grid + last))
    return kept
