"""How pictures are cut and placed: sizes as transformers' processors have them, and what a prompt's ids become."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from shared import pictures
from shared.protocol import (
    EdgeTiles,
    FreeSize,
    FreeTiles,
    ImageInput,
    ImageLayout,
    ImageSpec,
    OneCrop,
    OverlappingTiles,
    PanAndScan,
    RatioTiles,
    Sheet,
)
from shared.tiling import MOST_RATIO, edge_sizes, free_size, grids_by_area, nearest_ratio, pieces_along

RULES = [
    OneCrop(),
    OverlappingTiles(14, 4, 12),
    EdgeTiles(1456),
    EdgeTiles(1455),
    EdgeTiles(2912, is_split=False),
    EdgeTiles(9000),
    RatioTiles(1, 12),
    RatioTiles(3, 6),
    RatioTiles(1, 1),
    PanAndScan(256, 4, 1.2),
    FreeSize(200_000, 4_000_000),
    FreeSize(3000, 3500),
    FreeTiles(28, 64 * 784, 169 * 784, 2 * 169 * 784, 14, 2, 10),
    FreeTiles(28, 64 * 784, 169 * 784, 2 * 169 * 784, 14, 3, 6, shows_whole=False),
    FreeTiles(28, 20 * 784, 400 * 784, 400 * 784, 14, 1, 1),
]


def some_sizes(num: int) -> list[tuple[int, int]]:
    """(width, height): of all proportions, a few of them extreme."""
    rng = random.Random(4)
    return [
        (1, 1),
        (4, 9000),
        *((round(10 ** rng.uniform(0.7, 3.9)), round(10 ** rng.uniform(0.7, 3.9))) for _ in range(num)),
    ]


@pytest.mark.slow
def test_sizes_are_those_of_the_processors() -> None:
    from transformers.image_utils import SizeDict
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
    from transformers.models.idefics3 import image_processing_pil_idefics3 as idefics3
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    asked: list[SizeDict] = []

    class Asks(idefics3.Idefics3ImageProcessorPil):  # type: ignore[misc]
        def resize(self, image: object, size: SizeDict, **_: object) -> object:
            asked.append(size)
            return image

    processor, gemma = Asks(), Gemma3ImageProcessorPil()
    for width, height in some_sizes(100):
        empty = np.broadcast_to(np.zeros((3, 1, 1), np.uint8), (3, height, width))
        for longest, crop in ((1456, 364), (2048, 512), (333, 100)):
            scaled, cut = edge_sizes(width, height, longest, crop)
            assert scaled[::-1] == idefics3.get_resize_output_image_size(empty, longest), (width, height)
            processor.resize_for_vision_encoder(
                np.broadcast_to(np.zeros((3, 1, 1), np.uint8), (3, scaled[1], scaled[0])), crop
            )
            # Where theirs would have no pixels along an edge, ours has one crop.
            assert cut == (max(crop, asked[-1].width), max(crop, asked[-1].height))
        for least, most in ((1, 12), (2, 6)):
            found = nearest_ratio(width, height, 448, grids_by_area(least, most))
            assert found == get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        for unit, least, most in ((28, 3136, 12845056), (32, 65536, 1310720), (8, 256, 4096)):
            if max(width, height) <= MOST_RATIO * min(width, height):
                assert free_size(width, height, unit, least, most)[::-1] == smart_resize(
                    height, width, unit, least, most
                )
        boxes = pieces_along(width, height, 256, 4, 1.2)
        theirs = gemma.pan_and_scan(empty, 256, 4, 1.2)
        assert [(b - t, r - l) for l, t, r, b in boxes] == [piece.shape[1:] for piece in theirs]  # noqa: E741


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_picture_fits_its_own_spec(rule: Any) -> None:
    spec = ImageSpec(378 if isinstance(rule, OverlappingTiles) else 364, 5, rule)
    most_seen = 0
    for width, height in some_sizes(200):
        if pictures.refusal_of(spec, width, height):
            assert isinstance(rule, FreeSize | FreeTiles) and max(width, height) > MOST_RATIO * min(
                width, height
            )
            continue
        drawn = pictures.drawings(spec, width, height)
        sheets = [drawing.sheet for drawing in drawn]
        assert pictures.fault_of(spec, sheets) == ""
        assert all(drawing.sizes[-1] == (drawing.sheet.width, drawing.sheet.height) for drawing in drawn)
        assert 5 <= pictures.num_tokens(spec, sheets) <= pictures.max_tokens(spec)
        most_seen = max(most_seen, pictures.num_crops(sheets))
    assert most_seen <= pictures.max_crops(spec) <= max(2, 2 * most_seen)


def test_runs_leave_a_prompts_ids_bound_to_their_pictures() -> None:
    layout = ImageLayout("<i>", "<i>", whole="[<i>]", tile="({row},{col})<i>", row_end=";", overview="/<i>/")
    spec = ImageSpec(8, 3, EdgeTiles(16), layout=layout)
    tiled, whole = [Sheet(2, 2, 16, 16), Sheet(1, 1, 8, 8)], [Sheet(1, 1, 8, 8)]
    assert pictures.expansion(spec, tiled) == "(1,1)<i>(1,2)<i>;(2,1)<i>(2,2)<i>;/<i>/"
    assert pictures.expansion(spec, whole) == "[<i>]"
    ids = [7, 9, 7, 9, 9, 7, 9, 9, 9, 7]
    kept, runs = pictures.take_runs(spec, ids, 9, [tiled, whole])
    assert kept == [7, 7, 7, 7]
    assert runs == [[(1, 3), (2, 6), (3, 6)], [(3, 3)]], "side by side, of one picture: one run"
    with pytest.raises(ValueError, match="places for 6 crops, the pictures have 5"):
        pictures.take_runs(spec, ids, 9, [tiled])


def test_bounds_of_a_request() -> None:
    spec = ImageSpec(8, 3, OneCrop(), max_images=2, max_bytes=300)
    one = ImageInput([Sheet(1, 1, 8, 8)], [(1, 3)], b"")
    assert pictures.check_bounds(spec, [one]) == ""
    assert "at most 300 are accepted" in pictures.check_bounds(spec, [one] * 2)
    assert "at most 2 a request" in pictures.check_bounds(spec, [one] * 3)
