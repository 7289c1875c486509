"""Owns pictures as a model with overlapping tiles has them, for tests: the whole as one crop, then a canvas of tiles."""

from __future__ import annotations

from torch import Tensor

from shared.protocol import ImageInput, ImageSpec, OverlappingTiles, Sheet
from worker.forward import ImageCrops, ImageSheet


def spec_of(
    crop_size: int, patch_size: int, margin_patches: int, max_crops: int, num_tokens: int
) -> ImageSpec:
    return ImageSpec(
        crop_size, num_tokens, OverlappingTiles(patch_size, margin_patches, max_crops), attends="prefix"
    )


def image_input(
    position: int,
    num_tokens: int,
    side: int,
    digest: bytes,
    tiles: tuple[int, int] = (1, 1),
    canvas: tuple[int, int] | None = None,
) -> ImageInput:
    """`tiles` and `canvas` are (down, across) and (height, width)."""
    height, width = canvas or (side, side)
    return ImageInput(
        [Sheet(1, 1, side, side), Sheet(*tiles, height, width)], [(position, num_tokens)], digest
    )


def image_crops(whole: Tensor, canvas: Tensor, tiles_h: int, tiles_w: int) -> ImageCrops:
    return ImageCrops([ImageSheet(whole, 1, 1), ImageSheet(canvas, tiles_h, tiles_w)])
