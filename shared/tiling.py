"""Owns the arithmetic of cutting pictures: tile counts, canvas sizes, pieces. Any thread.

`shared.pictures` says which of it a model uses. Lengths are pixels unless a name says patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from shared.image_spec import OverlappingTiles

MOST_EDGE: Final = 4096
MOST_RATIO: Final = 200  # of a picture's sides, where its proportions are kept


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


def canvas_length(tiles: int, crop_size: int, margin: int) -> int:
    """Of so many tiles along an axis, neighbours sharing `margin` pixels."""
    return tiles * (crop_size - margin) + margin


def canvas_for(height: int, width: int, *, crop_size: int, rule: OverlappingTiles) -> Canvas:
    """The canvas of a `height × width` picture. Raises ValueError when the margins leave no window."""
    margin = 2 * rule.margin_patches * rule.patch_size
    tiles_h, tiles_w = choose_tiles(height, width, crop_size - margin, margin, rule.max_crops)
    return Canvas(
        tiles_h,
        tiles_w,
        canvas_length(tiles_h, crop_size, margin),
        canvas_length(tiles_w, crop_size, margin),
    )


def edge_sizes(
    width: int, height: int, longest_edge: int, crop_size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (width, height) that transformers' Idefics3 processor scales a picture to, and then rounds up to whole crops.

    In its floating-point steps, so that odd sizes come out alike.
    """
    ratio = width / height
    if width >= height:
        wide, high = longest_edge, int(longest_edge / ratio)
        high += high % 2
    else:
        wide, high = int(longest_edge * ratio), longest_edge
        wide += wide % 2
    wide, high = max(wide, 1), max(high, 1)
    # A picture is never larger than this along an edge, whatever is asked for.
    if wide >= high and wide > MOST_EDGE:
        wide, high = MOST_EDGE, int(MOST_EDGE / (wide / high))
    elif high > wide and high > MOST_EDGE:
        wide, high = int(MOST_EDGE * (wide / high)), MOST_EDGE
    scaled = (max(wide, 1), max(high, 1))
    ratio = scaled[0] / scaled[1]

    def whole(length: int) -> int:
        return math.ceil(length / crop_size) * crop_size

    if scaled[0] >= scaled[1]:
        cut_wide = whole(scaled[0])
        return scaled, (cut_wide, max(crop_size, whole(int(cut_wide / ratio))))
    cut_high = whole(scaled[1])
    return scaled, (max(crop_size, whole(int(cut_high * ratio))), cut_high)


Grid = tuple[int, int]
"""Columns and rows."""


@lru_cache
def grids_by_area(least: int, most: int) -> tuple[Grid, ...]:
    """All grids of `least` to `most` tiles, smaller ones first, of as many tiles those of fewer columns."""
    grids = [(cols, rows) for cols in range(1, most + 1) for rows in range(1, most + 1)]
    return tuple(sorted((g for g in grids if least <= g[0] * g[1] <= most), key=_area))


@lru_cache
def grids_by_chance(least: int, most: int) -> tuple[Grid, ...]:
    """The same; of as many tiles in the order of a set, as LFM2-VL's processor has it. Between equally near proportions
    the order decides, and hashes of numbers are the same in every process."""
    grids = {
        (cols, rows)
        for num in range(least, most + 1)
        for cols in range(1, num + 1)
        for rows in range(1, num + 1)
        if least <= cols * rows <= most
    }
    return tuple(sorted(grids, key=_area))


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]


def nearest_ratio(width: int, height: int, crop_size: int, grids: Sequence[Grid]) -> Grid:
    """The grid of tiles whose proportions are nearest to the picture's.

    Of equally near ones the later, while it has less than twice the picture's area (InternVL's rule).
    """
    best, best_off = (1, 1), math.inf
    for cols, rows in grids:
        off = abs(width / height - cols / rows)
        is_filled = width * height > 0.5 * crop_size * crop_size * cols * rows
        if off < best_off or (off == best_off and is_filled):
            best, best_off = (cols, rows), off
    return best


def free_size(width: int, height: int, unit: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (width, height) in whole units whose area lies within bounds, of nearly the same proportions.

    In the steps of Qwen's `smart_resize`, so that odd sizes come out alike.
    """
    high, wide = round(height / unit) * unit, round(width / unit) * unit
    if high * wide > max_pixels:
        by = math.sqrt((height * width) / max_pixels)
        high = max(unit, math.floor(height / by / unit) * unit)
        wide = max(unit, math.floor(width / by / unit) * unit)
    elif high * wide < min_pixels:
        by = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * by / unit) * unit
        wide = math.ceil(width * by / unit) * unit
    return max(wide, unit), max(high, unit)


def clip_size(
    width: int, height: int, unit: int, num_frames: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """As `free_size` for each of so many frames, whose area together lies within bounds; a lone one counts as two.

    In the steps of `smart_resize` of Qwen3-VL's video processor.
    """
    frames = max(2, num_frames)
    if height < unit or width < unit:
        by = max(unit / height, unit / width)
        height, width = int(height * by), int(width * by)
    high, wide, deep = round(height / unit) * unit, round(width / unit) * unit, round(frames / 2) * 2
    if deep * high * wide > max_pixels:
        by = math.sqrt((frames * height * width) / max_pixels)
        high = max(unit, math.floor(height / by / unit) * unit)
        wide = max(unit, math.floor(width / by / unit) * unit)
    elif deep * high * wide < min_pixels:
        by = math.sqrt(min_pixels / (frames * height * width))
        high = math.ceil(height * by / unit) * unit
        wide = math.ceil(width * by / unit) * unit
    return max(wide, unit), max(high, unit)


def free_size_of_one(width: int, height: int, unit: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """As `free_size`, but a side of less than half a unit counts as one when the area is judged (LFM2-VL)."""
    high, wide = max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)
    if min_pixels <= high * wide <= max_pixels:
        return wide, high
    if high * wide > max_pixels:
        by = math.sqrt((height * width) / max_pixels)
        high = max(unit, math.floor(height / by / unit) * unit)
        return max(unit, math.floor(width / by / unit) * unit), high
    by = math.sqrt(min_pixels / (height * width))
    return math.ceil(width * by / unit) * unit, math.ceil(height * by / unit) * unit


def is_large(width: int, height: int, unit: int, least_side: int, large_pixels: float) -> bool:
    """Whether a picture's area, in whole units, is beyond that; no side counts as less than `least_side`."""
    high, wide = (max(least_side, round(side / unit) * unit) for side in (height, width))
    return high * wide > large_pixels


def most_free_pixels(unit: int, min_pixels: int, max_pixels: int) -> int:
    """The largest area that `free_size` gives for pictures up to `MOST_RATIO` times as long as wide.

    Rounding up to a unit may overdraw both bounds, of long pictures above all.
    """
    rounded_up = min_pixels + math.ceil(15 * unit * math.sqrt(min_pixels)) + unit * unit
    one_unit_high = math.ceil(unit * math.sqrt(MOST_RATIO * max_pixels))
    return max(max_pixels, one_unit_high, rounded_up)


def pieces_along(
    width: int, height: int, min_crop: int, max_crops: int, min_ratio: float
) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) that cut a long picture along its longer edge; none if it is not long enough.

    Gemma 3's pan and scan.
    """
    long, short = max(width, height), min(width, height)
    if long / short < min_ratio:
        return []
    count = min(max_crops, max(2, min(long // min_crop, math.floor(long / short + 0.5))))
    step = math.ceil(long / count)
    if min(step, short) < min_crop:
        return []
    starts = [step * i for i in range(count) if step * i < long]
    if width >= height:
        return [(at, 0, min(at + step, width), height) for at in starts]
    return [(0, at, width, min(at + step, height)) for at in starts]
