"""Owns what a picture becomes by a model's `ImageSpec`: sheets of crops, positions, text. Pure; both sides of the wire.

The gateway resizes and writes prompts by it, the worker checks by it what it was sent. No family is known here. Lengths
are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.image_spec import (
    EdgeTiles,
    ImageInput,
    ImageSpec,
    OneCrop,
    OverlappingTiles,
    PanAndScan,
    RatioTiles,
    Sheet,
)
from shared.tiling import MOST_EDGE, canvas_for, canvas_length, edge_sizes, nearest_ratio, pieces_along

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a sheet's pixels come about: `box` of the picture (None: all of it), resized through each of `sizes` in turn."""

    sheet: Sheet
    sizes: tuple[Size, ...]
    box: Box | None = None


def drawings(spec: ImageSpec, width: int, height: int) -> list[Drawing]:
    """The sheets of a picture, in the order in which the prompt has their crops."""
    side, rule = spec.crop_size, spec.rule
    match rule:
        case OneCrop():
            return [_whole(side)]
        case OverlappingTiles():
            canvas = canvas_for(height, width, crop_size=side, rule=rule)
            sheet = Sheet(canvas.tiles_h, canvas.tiles_w, canvas.height, canvas.width)
            return [_whole(side), Drawing(sheet, ((canvas.width, canvas.height),))]
        case EdgeTiles():
            scaled, cut = edge_sizes(width, height, rule.longest_edge, side)
            if not rule.is_split:
                return [_whole(side, scaled)]
            if cut == (side, side):
                return [_whole(side, scaled)]
            sheet = Sheet(cut[1] // side, cut[0] // side, cut[1], cut[0])
            return [Drawing(sheet, (scaled, cut)), _whole(side, scaled, cut)]
        case RatioTiles():
            cols, rows = nearest_ratio(width, height, side, rule.min_tiles, rule.max_tiles)
            size = (cols * side, rows * side)
            tiles = Drawing(Sheet(rows, cols, size[1], size[0]), (size,))
            return [tiles] if rows * cols == 1 else [tiles, _whole(side)]
        case PanAndScan():
            boxes = pieces_along(width, height, rule.min_crop, rule.max_crops, rule.min_ratio)
            one = Sheet(1, 1, side, side)
            return [_whole(side), *(Drawing(one, ((side, side),), box) for box in boxes)]


def _whole(side: int, *sizes: Size) -> Drawing:
    return Drawing(Sheet(1, 1, side, side), (*sizes, (side, side)))


def shares_tokens(spec: ImageSpec) -> bool:
    """Whether all crops of a picture give one run of positions, because their features are pooled."""
    return isinstance(spec.rule, OverlappingTiles)


def num_crops(sheets: Sequence[Sheet]) -> int:
    """Crops that the device cuts of the sheets."""
    return sum(sheet.rows * sheet.cols for sheet in sheets)


def num_tokens(spec: ImageSpec, sheets: Sequence[Sheet]) -> int:
    """Positions that a picture takes in a prompt, without the text around them."""
    return spec.crop_tokens * (1 if shares_tokens(spec) else num_crops(sheets))


def num_bytes(sheets: Sequence[Sheet]) -> int:
    """Bytes of pixels."""
    return sum(3 * sheet.height * sheet.width for sheet in sheets)


def max_crops(spec: ImageSpec) -> int:
    """The most crops that a picture has, whatever its size."""
    rule = spec.rule
    match rule:
        case OneCrop():
            return 1
        case OverlappingTiles():
            return 1 + rule.max_crops
        case EdgeTiles():
            edge = min(rule.longest_edge, MOST_EDGE)
            along = math.ceil((edge + edge % 2) / spec.crop_size)
            return 1 + along * along if rule.is_split and along > 1 else 1
        case RatioTiles():
            return 1 if rule.max_tiles == 1 else 1 + rule.max_tiles
        case PanAndScan():
            return 1 + rule.max_crops


def max_tokens(spec: ImageSpec) -> int:
    """The most positions that a picture takes."""
    return spec.crop_tokens * (1 if shares_tokens(spec) else max_crops(spec))


def margin_of(spec: ImageSpec) -> int:
    """What neighbouring crops of a sheet share."""
    rule = spec.rule
    return 2 * rule.margin_patches * rule.patch_size if isinstance(rule, OverlappingTiles) else 0


def fault_of(spec: ImageSpec, sheets: Sequence[Sheet]) -> str:
    """What is wrong with the sheets of a picture, in words; empty if this spec can have made them."""
    if not sheets:
        return "a picture has no sheets"
    margin = margin_of(spec)
    for sheet in sheets:
        if sheet.rows < 1 or sheet.cols < 1:
            return "a sheet has no crops"
        wanted = [canvas_length(count, spec.crop_size, margin) for count in (sheet.rows, sheet.cols)]
        if [sheet.height, sheet.width] != wanted:
            return f"a sheet of {sheet.rows}×{sheet.cols} crops has {wanted[0]}×{wanted[1]} pixels"
    most = max_crops(spec)
    if num_crops(sheets) > most:
        return f"a picture has at most {most} crops, not {num_crops(sheets)}"
    if shares_tokens(spec) and [len(sheets), sheets[0].rows, sheets[0].cols] != [2, 1, 1]:
        return "a picture has two sheets here, the whole and its tiles"
    return ""


def check_bounds(spec: ImageSpec, images: Sequence[ImageInput]) -> str:
    """What bound a request's pictures exceed together, in words; empty if none."""
    if len(images) > spec.max_images:
        return f"{len(images)} pictures; at most {spec.max_images} a request are accepted"
    held = sum(num_bytes(image.sheets) for image in images)
    if held > spec.max_bytes:
        return f"the pictures have {held} bytes of pixels as the model sees them; at most {spec.max_bytes} are accepted"
    return ""


# ---------------------------------------------------------------- in a prompt's text


def expansion(spec: ImageSpec, sheets: Sequence[Sheet]) -> str:
    """What stands for a picture in a prompt's text, with `layout.run` for each crop, in the order of the sheets' crops."""
    layout, rule = spec.layout, spec.rule
    if num_crops(sheets) == 1:
        return layout.whole
    shows_whole_first = isinstance(rule, PanAndScan)
    tiles = sheets[1:] if shows_whole_first else sheets[:-1]
    rows = [
        layout.tile_gap.join(
            layout.tile.replace("{row}", str(row + 1)).replace("{col}", str(col + 1))
            for col in range(sheet.cols)
        )
        for sheet in tiles
        for row in range(sheet.rows)
    ]
    # Pieces of one crop each, one sheet a piece, are one row.
    written = (
        layout.tile_gap.join(rows) if shows_whole_first else "".join(row + layout.row_end for row in rows)
    )
    parts = (layout.overview, written) if shows_whole_first else (written, layout.overview)
    return f"{layout.before}{''.join(parts)}{layout.after}"


def take_runs(
    spec: ImageSpec, ids: Sequence[int], run_id: int, pictures: Sequence[Sequence[Sheet]]
) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Ids of a prompt whose text has `expansion`s, in order → the ids without `run_id`, and each picture's runs.

    Runs side by side are joined. Raises ValueError if there are not as many as the pictures have crops.
    """
    kept: list[int] = []
    places: list[int] = []
    for token_id in ids:
        if token_id == run_id:
            places.append(len(kept))
        else:
            kept.append(token_id)
    counts = [num_tokens(spec, sheets) // spec.crop_tokens for sheets in pictures]
    if sum(counts) != len(places):
        raise ValueError(f"the prompt has places for {len(places)} crops, the pictures have {sum(counts)}")
    runs: list[list[tuple[int, int]]] = []
    at = 0
    for count in counts:
        own: list[tuple[int, int]] = []
        for place in places[at : at + count]:
            if own and own[-1][0] == place and spec.attends == "causal":
                own[-1] = (place, own[-1][1] + spec.crop_tokens)
            else:
                own.append((place, spec.crop_tokens))
        runs.append(own)
        at += count
    return kept, runs
