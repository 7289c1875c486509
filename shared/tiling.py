"""Owns how a picture is split into overlapping crops: tile counts and canvas size. Any thread.

Both sides of the wire use it: the gateway to resize a picture to its canvas, the worker to cut the canvas
again and to check what it was sent. Lengths are pixels unless a name says patches.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Canvas(NamedTuple):
    """How many tiles a picture gets along each axis, and the size to resize it to before cutting."""

    tiles_h: int
    tiles_w: int
    height: int
    width: int


def choose_tiles(height: int, width: int, window: int, margin: int, max_crops: int) -> tuple[int, int]:
    """Tile counts (down, across) for a `height × width` picture, at most `max_crops` in all.

    `window` is what one tile adds to the canvas (the crop less its margins), `margin` the overlap of *both*
    sides together: 266 and 112 for the released Moondream 2. Raises ValueError on lengths below 1.
    """
    if height < 1 or width < 1 or window < 1 or max_crops < 1 or margin < 0:
        raise ValueError(f"no tiling for {height}×{width} with window {window}, {max_crops} crops")
    inner_h, inner_w = height - margin, width - margin
    if inner_h <= window or inner_w <= window:
        return 1, 1
    min_h, min_w = math.ceil(inner_h / window), math.ceil(inner_w / window)
    if min_h * min_w > max_crops:
        # Too large for one crop per window: keep the proportions, lose resolution.
        ratio = math.sqrt(max_crops / (min_h * min_w))
        return max(1, math.floor(min_h * ratio)), max(1, math.floor(min_w * ratio))
    tiles_h = max(math.floor(math.sqrt(max_crops * inner_h / inner_w)), min_h)
    tiles_w = max(math.floor(math.sqrt(max_crops * inner_w / inner_h)), min_w)
    if tiles_h * tiles_w > max_crops:
        if tiles_w > tiles_h:
            tiles_w = max_crops // tiles_h
        else:
            tiles_h = max_crops // tiles_w
    return max(1, tiles_h), max(1, tiles_w)


def canvas_for(
    height: int, width: int, *, crop_size: int, patch_size: int, margin_patches: int, max_crops: int
) -> Canvas:
    """The canvas of a `height × width` picture; the keywords are the fields of `protocol.ImageSpec`.

    Raises ValueError when the margins leave no window.
    """
    margin = 2 * margin_patches * patch_size
    window = crop_size - margin
    tiles_h, tiles_w = choose_tiles(height, width, window, margin, max_crops)
    return Canvas(tiles_h, tiles_w, tiles_h * window + margin, tiles_w * window + margin)
