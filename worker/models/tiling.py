"""Owns the device's side of tiling: cutting sheets into crops, and undoing it for features. Decode thread."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.forward import ImageCrops, ImageSheet


def cut_crops(image: ImageCrops, crop_size: int, margin: int = 0) -> Tensor:
    """One picture → (C, S, S, 3) uint8 on the device: the crops of its sheets in order, row by row.

    Neighbouring crops of a sheet share `margin` pixels. Raises ValueError when a sheet is not of the size that its
    crops ask for.
    """
    return torch.cat([_cut(sheet, crop_size, margin) for sheet in image.sheets])


def _cut(sheet: ImageSheet, crop_size: int, margin: int) -> Tensor:
    window = crop_size - margin
    height, width = sheet.rows * window + margin, sheet.cols * window + margin
    if sheet.pixels.shape != (height, width, 3):
        raise ValueError(
            f"{sheet.rows}×{sheet.cols} crops need a sheet of {height}×{width}, not {tuple(sheet.pixels.shape)}"
        )
    if sheet.rows == sheet.cols == 1:
        return sheet.pixels.unsqueeze(0)
    tiles = sheet.pixels.unfold(0, crop_size, window).unfold(1, crop_size, window)
    return tiles.permute(0, 1, 3, 4, 2).reshape(-1, crop_size, crop_size, 3)


def stitch_rows(tiles: int, grid: int, margin: int) -> list[int]:
    """Which of `tiles · grid` feature rows to keep, in order: interior margins belong to the neighbour's middle."""
    kept: list[int] = []
    for tile in range(tiles):
        first = 0 if tile == 0 else margin
        last = grid if tile == tiles - 1 else grid - margin
        kept.extend(range(tile * grid + first, tile * grid + last))
    return kept
