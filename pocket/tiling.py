"""Owns cutting a picture into crops for training and evaluation; runs in the drawing process. numpy and PIL only."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocket.network import VisionConfig


def choose_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """Tiles (down, across) for a picture's sides less both margins, in pixels."""
    if height <= window or width <= window:
        return (1, 1)
    min_h, min_w = math.ceil(height / window), math.ceil(width / window)
    if min_h * min_w > max_crops:
        ratio = math.sqrt(max_crops / (min_h * min_w))
        return (max(1, math.floor(min_h * ratio)), max(1, math.floor(min_w * ratio)))
    tiles_h = max(math.floor(math.sqrt(max_crops * height / width)), min_h)
    tiles_w = max(math.floor(math.sqrt(max_crops * width / height)), min_w)
    if tiles_h * tiles_w > max_crops:
        if tiles_w > tiles_h:
            tiles_w = math.floor(max_crops / tiles_h)
        else:
            tiles_h = math.floor(max_crops / tiles_w)
    return (max(1, tiles_h), max(1, tiles_w))


def picture_tiling(width: int, height: int, config: VisionConfig) -> tuple[int, int]:
    """Tiling of a picture of this size in pixels."""
    margin = 2 * config.overlap_margin * config.enc_patch_size
    return choose_tiling(height - margin, width - margin, config.crop_size - margin, config.max_crops)


def cut_crops(picture: Image.Image, config: VisionConfig) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Crops uint8 (N, size, size, 3), the whole picture first, and the tiling; (1, 1) yields one crop."""
    size = config.crop_size
    margin = 2 * config.overlap_margin * config.enc_patch_size
    window = size - margin
    tiling = picture_tiling(picture.width, picture.height, config)
    whole = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
    if tiling == (1, 1):
        return whole[None], tiling
    target = (tiling[1] * window + margin, tiling[0] * window + margin)
    resized = np.asarray(picture.resize(target, Image.Resampling.LANCZOS))
    crops = [whole]
    for y in range(0, tiling[0] * window, window):
        crops.extend(resized[y : y + size, x : x + size] for x in range(0, tiling[1] * window, window))
    return np.stack(crops), tiling
