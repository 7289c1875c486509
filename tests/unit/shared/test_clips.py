"""What a clip's frames become: sizes as transformers' video processor has them, bounds, texts, and moments."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from shared import clips, pictures
from shared.image_spec import (
    ClipLayout,
    ClipSize,
    ClipSpec,
    EdgeTiles,
    FreeSize,
    ImageInput,
    ImageSpec,
    OneCrop,
    Sheet,
)
from shared.tiling import MOST_RATIO, clip_size
from worker.schedule.rotary_places import prompt_places
from worker.schedule.sequence import Picture, Run

LAYOUT = ClipLayout(
    "<v>",
    before="{frames_in_words} in {duration}.",
    frame="({number} {clock} {seconds}<i>)",
    gap=";",
    after="!",
)
OF_EACH = ClipSpec(FreeSize(3136, 1 << 24), "bicubic", LAYOUT, 128, 2.0, 2, 8192, 1280, 2.0)
FREE = ImageSpec(32, 1, FreeSize(3136, 32 * 32 * 1280), position_axes=3, clip=OF_EACH)
SHARED = replace(FREE, clip=replace(OF_EACH, rule=ClipSize(128 * 1024, 1 << 24), steps_per_second=0.0))
CROPS = ImageSpec(
    512, 64, EdgeTiles(2048), clip=ClipSpec(EdgeTiles(2048, is_split=False), "lanczos", LAYOUT, 64, 1.0)
)


def some_sizes(num: int) -> list[tuple[int, int]]:
    rng = random.Random(4)
    found = [(round(10 ** rng.uniform(0.7, 3.9)), round(10 ** rng.uniform(0.7, 3.9))) for _ in range(num)]
    return [size for size in found if max(size) <= MOST_RATIO * min(size)]


@pytest.mark.slow
def test_sizes_are_those_of_the_processor() -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    for width, height in some_sizes(100):
        for frames in (2, 3, 5, 8, 64):
            for unit, least, most in ((32, 4096, 25165824), (8, 256, 4096), (28, 128 * 784, 768 * 784)):
                theirs = smart_resize(frames, height, width, 2, unit, least, most)
                assert clip_size(width, height, unit, frames, least, most) == theirs[::-1]


@pytest.mark.parametrize("spec", [FREE, SHARED, CROPS], ids=["each", "shared", "crops"])
def test_what_a_gateway_makes_of_frames_a_worker_takes(spec: ImageSpec) -> None:
    assert spec.clip is not None
    for num_frames in (1, 2, 3, 5, 17, 128):
        own = clips.frame_spec(spec, num_frames)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(own), type=ImageSpec) == own, (
            "it goes to a picture process"
        )
        for width, height in some_sizes(60):
            (drawing,) = pictures.drawings(own, width, height)
            group = min(num_frames, spec.clip.group)
            sheet = replace(drawing.sheet, rows=group, height=group * drawing.sheet.height)
            image = ImageInput([sheet], [(0, 1)], b"", num_frames=group)
            assert clips.fault_of_input(spec, image) == ""
            tokens = pictures.num_tokens(spec, [sheet])
            assert tokens == pictures.num_tokens(own, [drawing.sheet])
            num_groups = -(-num_frames // spec.clip.group)
            # Sides are whole squares, so a long frame may be larger than its share.
            if max(width, height) < 4 * min(width, height):
                assert tokens * num_groups <= (spec.clip.max_tokens or 64 * 128) * 1.3


def test_what_no_gateway_can_have_made() -> None:
    good = ImageInput([Sheet(2, 1, 128, 32)], [(0, 2)], b"", num_frames=2)
    assert clips.fault_of_input(FREE, good) == ""
    cases: list[tuple[ImageSpec, dict[str, Any], str]] = [
        (FREE, {"num_frames": 3}, "1 to 2 frames"),
        (FREE, {"num_frames": 1}, "one below the other"),
        (FREE, {"sheets": [Sheet(2, 1, 129, 32)]}, "one below the other"),
        (FREE, {"sheets": [Sheet(2, 1, 128, 32)] * 2}, "in one sheet"),
        (FREE, {"sheets": [Sheet(2, 1, 126, 32)]}, "whole multiples of 32 pixels"),
        (FREE, {"sheets": [Sheet(2, 1, 25600, 3200)]}, "positions"),
        (FREE, {"moment": -1}, "moment"),
        (SHARED, {"moment": 1}, "no time for"),
        (SHARED, {"is_continued": True}, "no time for"),
        (replace(FREE, clip=None), {}, "reads no frames"),
    ]
    for spec, changes, words in cases:
        assert words in clips.fault_of_input(spec, replace(good, **changes)), changes
    assert "single pictures only" in pictures.check_bounds(replace(FREE, clip=None), [good])
    assert "130 frames; at most 128" in pictures.check_bounds(FREE, [good] * 65)
    still = ImageInput([Sheet(1, 1, 64, 32)], [(0, 2)], b"")
    assert pictures.check_bounds(replace(FREE, max_images=1), [still, good]) == ""


def test_texts_and_moments() -> None:
    times = clips.evenly(3, 0.5)
    assert clips.clip_text(FREE, times) == "three in 0:00:04.(1 00:00 1.0<i>);(2 00:04 4.0<i>)!"
    assert clips.clip_text(CROPS, clips.ClipTimes((1.26, 3725.5), duration=3730.0)) == (
        "two in 1:02:10.(1 00:01 1.3<i>);(2 62:05 3725.5<i>)!"
    )
    assert FREE.clip is not None and SHARED.clip is not None
    assert clips.moments(FREE.clip, times) == [0, 8]
    assert clips.moments(FREE.clip, clips.evenly(8, 3.0)) == [0, 1, 2, 4]
    assert clips.moments(FREE.clip, clips.ClipTimes((5.0, 6.0, 7.2))) == [0, 4]
    assert clips.moments(SHARED.clip, times) == [0, 0]
    words = [clips.in_words(number) for number in (1, 13, 20, 21, 64, 99, 100, 101, 128, 512)]
    assert words == [
        "one",
        "thirteen",
        "twenty",
        "twenty-one",
        "sixty-four",
        "ninety-nine",
        "one hundred",
        "one hundred and one",
        "one hundred and twenty-eight",
        "five hundred and twelve",
    ]


def test_positions_of_a_clip_and_what_follows() -> None:
    """Two groups of two squares by three, eight steps apart, then a still picture and text: the answer goes on behind the latest."""
    grid = (2, 3)
    sheet, moments = Sheet(1, 1, 64, 96), (0, 8)
    groups = [
        Picture(
            (Run(2 + 6 * number, 6, 0),), [sheet], [], b"", grid=grid, moment=moment, is_continued=number > 0
        )
        for number, moment in enumerate(moments)
    ]
    still = Picture((Run(15, 6, 0),), [sheet], [], b"", grid=grid)
    places, shift = prompt_places(22, [*groups, still])
    assert places[:, :14].tolist() == [
        [0, 1, *[2] * 6, *[10] * 6],
        [0, 1, *[2, 2, 2, 3, 3, 3] * 2],
        [0, 1, *[2, 3, 4] * 4],
    ]
    assert places[:, 14].tolist() == [5, 5, 5] and places[:, 15].tolist() == [6, 6, 6]
    assert places[:, 21].tolist() == [9, 9, 9] and shift == 11 - 22
    sent = [
        ImageInput([sheet], [(2, 6)], b"", 1, moment, number > 0) for number, moment in enumerate(moments)
    ]
    sent.append(ImageInput([sheet], [(3, 6)], b""))
    assert clips.num_positions(FREE, 4, sent) == 11 == 22 + shift
    assert clips.num_positions(replace(FREE, position_axes=1), 4, sent) == 22
    of_crops = replace(FREE, clip=replace(OF_EACH, rule=OneCrop()))
    assert isinstance(clips.frame_spec(of_crops, 3).rule, OneCrop)
    assert np.diff(places[0]).max() == 8
