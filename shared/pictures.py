"""Owns what a picture becomes by a model's `ImageSpec`: sheets of crops, positions, text. Pure; both sides of the wire.

The gateway resizes and writes prompts by it, the worker checks by it what it was sent. No family is known here. Lengths
are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.image_spec import (
    ClipSize,
    EdgeTiles,
    FreeSize,
    FreeTiles,
    ImageInput,
    ImageSpec,
    OneCrop,
    OverlappingTiles,
    PanAndScan,
    RatioTiles,
    Sheet,
)
from shared.tiling import (
    MOST_EDGE,
    MOST_RATIO,
    canvas_for,
    canvas_length,
    clip_size,
    edge_sizes,
    free_size,
    free_size_of_one,
    grids_by_area,
    grids_by_chance,
    is_large,
    most_free_pixels,
    nearest_ratio,
    pieces_along,
)

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom

LOAD_PIXELS = 448 * 448
"""What counts as one crop of a picture that is not cut into crops of one size."""


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
            tiles = _tiles(
                nearest_ratio(width, height, side, grids_by_area(rule.min_tiles, rule.max_tiles)), side
            )
            rows, cols = tiles.sheet.rows, tiles.sheet.cols
            return [tiles] if rows * cols == 1 else [tiles, _whole(side)]
        case PanAndScan():
            boxes = pieces_along(width, height, rule.min_crop, rule.max_crops, rule.min_ratio)
            one = Sheet(1, 1, side, side)
            return [_whole(side), *(Drawing(one, ((side, side),), box) for box in boxes)]
        case ClipSize():
            bounds = (rule.num_frames, rule.min_pixels, rule.max_pixels)
            return [_free(clip_size(width, height, side, *bounds))]
        case FreeSize():
            return [_free(free_size(width, height, side, rule.min_pixels, rule.max_pixels))]
        case FreeTiles():
            whole = _free(free_size_of_one(width, height, rule.unit, rule.min_pixels, rule.max_pixels))
            large = is_large(width, height, rule.unit, rule.least_side, rule.large_pixels)
            if rule.max_tiles == 1 or not large:
                return [whole]
            grids = grids_by_chance(rule.min_tiles, rule.max_tiles)
            tiles = _tiles(nearest_ratio(width, height, side, grids), side)
            return [tiles, whole] if rule.shows_whole else [tiles]


def refusal_of(spec: ImageSpec, width: int, height: int) -> str:
    """Why a picture of this size cannot be prepared, in words; empty if it can."""
    is_free = isinstance(spec.rule, FreeSize | FreeTiles)
    if is_free and max(width, height) > MOST_RATIO * min(width, height):
        return f"a picture of {width}×{height} pixels is more than {MOST_RATIO} times as long as wide"
    return ""


def _whole(side: int, *sizes: Size) -> Drawing:
    return Drawing(Sheet(1, 1, side, side), (*sizes, (side, side)))


def _free(size: Size) -> Drawing:
    return Drawing(Sheet(1, 1, size[1], size[0]), (size,))


def _tiles(grid: tuple[int, int], side: int) -> Drawing:
    cols, rows = grid
    size = (cols * side, rows * side)
    return Drawing(Sheet(rows, cols, size[1], size[0]), (size,))


def shares_tokens(spec: ImageSpec) -> bool:
    """Whether all crops of a picture give one run of positions, because their features are pooled."""
    return isinstance(spec.rule, OverlappingTiles)


def num_crops(sheets: Sequence[Sheet]) -> int:
    """Crops that the device cuts of the sheets."""
    return sum(sheet.rows * sheet.cols for sheet in sheets)


def num_tokens(spec: ImageSpec, sheets: Sequence[Sheet]) -> int:
    """Positions that a picture takes in a prompt, without the text around them."""
    return sum(_run_sizes(spec, sheets))


def unit_tokens(spec: ImageSpec) -> int:
    """Positions of what is encoded by itself: a crop, of which the last of a picture may have fewer; 0: a whole picture."""
    if shares_tokens(spec) or isinstance(spec.rule, FreeSize):
        return 0
    if isinstance(spec.rule, FreeTiles) and _most_free_tokens(spec.rule) > spec.crop_tokens:
        return 0
    return spec.crop_tokens


def _most_free_tokens(rule: FreeTiles) -> int:
    return most_free_pixels(rule.unit, rule.min_pixels, rule.max_pixels) // rule.unit**2


def grid_of(spec: ImageSpec, sheets: Sequence[Sheet]) -> tuple[int, int]:
    """Rows and columns of the positions of a picture that keeps its proportions, or of a group of frames; (0, 0) of others."""
    if not sheets or not isinstance(spec.rule, FreeSize):
        return 0, 0
    return sheets[0].height // sheets[0].rows // spec.crop_size, sheets[0].width // spec.crop_size


def num_loads(spec: ImageSpec, sheets: Sequence[Sheet]) -> int:
    """What encoding a picture costs, in crops: a large picture that is one crop counts by its area."""
    if isinstance(spec.rule, FreeSize):
        return math.ceil(sheets[0].height // sheets[0].rows * sheets[0].width / LOAD_PIXELS)
    return num_crops(sheets)


def num_bytes(sheets: Sequence[Sheet]) -> int:
    """Bytes of pixels."""
    return sum(3 * sheet.height * sheet.width for sheet in sheets)


def max_crops(spec: ImageSpec) -> int:
    """The most crops that a picture has, whatever its size."""
    rule = spec.rule
    match rule:
        case OneCrop() | FreeSize():
            return 1
        case OverlappingTiles():
            return 1 + rule.max_crops
        case EdgeTiles():
            edge = min(rule.longest_edge, MOST_EDGE)
            along = math.ceil((edge + edge % 2) / spec.crop_size)
            return 1 + along * along if rule.is_split and along > 1 else 1
        case RatioTiles() | FreeTiles():
            return 1 if rule.max_tiles == 1 else 1 + rule.max_tiles
        case PanAndScan():
            return 1 + rule.max_crops


def max_tokens(spec: ImageSpec) -> int:
    """The most positions that a picture takes."""
    if isinstance(spec.rule, FreeSize):
        # A clip's frames are judged as pairs, of an odd number as one fewer or one more.
        frames = max(2, spec.rule.num_frames - 1) if isinstance(spec.rule, ClipSize) else 1
        bounds = (math.ceil(area / frames) for area in (spec.rule.min_pixels, spec.rule.max_pixels))
        return spec.crop_tokens * (most_free_pixels(spec.crop_size, *bounds) // spec.crop_size**2)
    if isinstance(spec.rule, FreeTiles):
        free = _most_free_tokens(spec.rule)
        return free if spec.rule.max_tiles == 1 else spec.crop_tokens * spec.rule.max_tiles + free
    return spec.crop_tokens * (1 if shares_tokens(spec) else max_crops(spec))


def margin_of(spec: ImageSpec) -> int:
    """What neighbouring crops of a sheet share."""
    rule = spec.rule
    return 2 * rule.margin_patches * rule.patch_size if isinstance(rule, OverlappingTiles) else 0


def fault_of(spec: ImageSpec, sheets: Sequence[Sheet]) -> str:
    """What is wrong with the sheets of a picture, in words; empty if this spec can have made them."""
    if not sheets:
        return "a picture has no sheets"
    if isinstance(spec.rule, FreeSize):
        return _free_fault(spec, sheets)
    if isinstance(spec.rule, FreeTiles):
        return _free_tiles_fault(spec, spec.rule, sheets)
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


def _free_fault(spec: ImageSpec, sheets: Sequence[Sheet]) -> str:
    sheet, unit = sheets[0], spec.crop_size
    if len(sheets) > 1 or (sheet.rows, sheet.cols) != (1, 1):
        return "a picture is one crop here"
    if min(sheet.height, sheet.width) < unit or sheet.height % unit or sheet.width % unit:
        return f"a picture's sides are whole multiples of {unit} pixels"
    if num_tokens(spec, sheets) > max_tokens(spec):
        return f"a picture has at most {max_tokens(spec)} positions, not {num_tokens(spec, sheets)}"
    return ""


def _free_tiles_fault(spec: ImageSpec, rule: FreeTiles, sheets: Sequence[Sheet]) -> str:
    tiles, free = _split(sheets)
    if len(tiles) > 1 or len(free) > 1:
        return "a picture has a sheet of tiles and one that shows the whole, or one of them"
    for sheet in tiles:
        wanted = [sheet.rows * spec.crop_size, sheet.cols * spec.crop_size]
        if min(sheet.rows, sheet.cols) < 1 or [sheet.height, sheet.width] != wanted:
            return f"a sheet of {sheet.rows}×{sheet.cols} crops has {wanted[0]}×{wanted[1]} pixels"
        if not rule.min_tiles <= sheet.rows * sheet.cols <= rule.max_tiles:
            return f"a picture has {rule.min_tiles} to {rule.max_tiles} tiles"
    if bool(tiles) and bool(free) != rule.shows_whole:
        return "a picture in tiles has " + ("a sheet of the whole" if rule.shows_whole else "no other sheet")
    for sheet in free:
        if min(sheet.height, sheet.width) < rule.unit or sheet.height % rule.unit or sheet.width % rule.unit:
            return f"a picture's sides are whole multiples of {rule.unit} pixels"
        if sheet.height * sheet.width > _most_free_tokens(rule) * rule.unit**2:
            return f"a crop has at most {_most_free_tokens(rule)} positions"
    return ""


def _split(sheets: Sequence[Sheet]) -> tuple[list[Sheet], list[Sheet]]:
    """The sheets of tiles, and those of one crop of any size."""
    tiles = [sheet for sheet in sheets if (sheet.rows, sheet.cols) != (1, 1)]
    return tiles, [sheet for sheet in sheets if (sheet.rows, sheet.cols) == (1, 1)]


def check_bounds(spec: ImageSpec, images: Sequence[ImageInput]) -> str:
    """What bound a request's pictures exceed together, in words; empty if none."""
    num_frames = sum(image.num_frames for image in images)
    num_stills = sum(not image.num_frames for image in images)
    if num_stills > spec.max_images:
        return f"{num_stills} pictures; at most {spec.max_images} a request are accepted"
    if num_frames and spec.clip is None:
        return "frames of a video; this model reads single pictures only"
    if spec.clip is not None and num_frames > spec.clip.max_frames:
        return f"{num_frames} frames; at most {spec.clip.max_frames} a request are accepted"
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
    if isinstance(rule, FreeTiles):
        tiles = _split(sheets)[0]
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
    wanted = [_run_sizes(spec, sheets) for sheets in pictures]
    if sum(map(len, wanted)) != len(places):
        raise ValueError(
            f"the prompt has places for {len(places)} crops, the pictures have {sum(map(len, wanted))}"
        )
    runs: list[list[tuple[int, int]]] = []
    at = 0
    for sizes in wanted:
        own: list[tuple[int, int]] = []
        for place, size in zip(places[at : at + len(sizes)], sizes, strict=True):
            if own and own[-1][0] == place and spec.attends == "causal":
                own[-1] = (place, own[-1][1] + size)
            else:
                own.append((place, size))
        runs.append(own)
        at += len(sizes)
    return kept, runs


def _run_sizes(spec: ImageSpec, sheets: Sequence[Sheet]) -> list[int]:
    """Positions of each run token of a picture."""
    rule = spec.rule
    if isinstance(rule, FreeSize):
        rows, cols = grid_of(spec, sheets)
        return [spec.crop_tokens * rows * cols]
    if isinstance(rule, FreeTiles):
        tiles, free = _split(sheets)
        sizes = [spec.crop_tokens] * num_crops(tiles)
        return sizes + [sheet.height // rule.unit * (sheet.width // rule.unit) for sheet in free]
    return [spec.crop_tokens] * (1 if shares_tokens(spec) else num_crops(sheets))
