"""What a worker takes of a request's pictures: places in order, sizes of sheets, and the bounds it announced."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import ErrorCode
from shared.protocol import (
    EdgeTiles,
    FeatureFormat,
    ImageInput,
    ImageLayout,
    ImageSpec,
    ModelCard,
    Sheet,
    Submit,
    pack_i32,
)
from worker.schedule.intake import build_sequence
from worker.schedule.plan import Chunk, crops_of
from worker.schedule.refusal import Refusal
from worker.schedule.sequence import IMAGE_TOKEN, Run, Sequence

SPEC = ImageSpec(
    8, 3, EdgeTiles(16), layout=ImageLayout("<i>", "<i>"), attends="block", max_images=2, max_bytes=2000
)
CARD = ModelCard("m", "fake", 100, 97, 0, [0], image=SPEC)
TILES = [Sheet(1, 2, 8, 16), Sheet(1, 1, 8, 8)]
PIXELS = [bytes(384), bytes(192)]


def built(
    images: list[ImageInput], frames: list[bytes], prompt: list[int], card: ModelCard = CARD
) -> Sequence:
    message = Submit(1, 1, "r", pack_i32(prompt), 4, images=images)
    return build_sequence(b"gateway", message, frames, card, 0.0)


def test_runs_of_several_pictures_stand_where_they_are_placed() -> None:
    one = ImageInput([Sheet(1, 1, 8, 8)], [(1, 3)], b"one")
    two = ImageInput(TILES, [(1, 3), (2, 3), (2, 3)], b"two")
    seq = built([one, two], [bytes(192), *PIXELS], [5, 6, 7])
    x = IMAGE_TOKEN
    assert seq.tokens == [5, x, x, x, x, x, x, 6, *[x] * 6, 7] and seq.num_prompt == 15
    assert [picture.runs for picture in seq.pictures] == [
        (Run(1, 3, 0),),
        (Run(4, 3, 0), Run(8, 3, 3), Run(11, 3, 6)),
    ]
    assert [picture.num_crops for picture in seq.pictures] == [1, 3]
    assert seq.pictures[1].frames == PIXELS and (seq.pictures[1].position, seq.pictures[1].end) == (4, 14)
    assert seq.blocks == [(1, 4), (4, 7), (8, 11), (11, 14)], "each run is a block of its own"


@pytest.mark.parametrize(
    ("image", "frames", "words"),
    [
        (ImageInput(TILES, [(1, 9)], b""), PIXELS[:1], "came with 1 frames"),
        (ImageInput(TILES, [(1, 8)], b""), PIXELS, "have 9 positions together"),
        (ImageInput(TILES, [(1, 10), (2, -1)], b""), PIXELS, "have 9 positions together"),
        (ImageInput(TILES, [(2, 3), (1, 6)], b""), PIXELS, "lie in 2 … 3, in order"),
        (ImageInput(TILES, [(4, 9)], b""), PIXELS, "lie in 0 … 3"),
        (ImageInput(TILES, [(1, 9)], b""), [bytes(384), bytes(191)], "wrong size"),
        (ImageInput([Sheet(1, 2, 8, 15)], [(1, 6)], b""), PIXELS[:1], "1×2 crops has 8×16 pixels"),
        (ImageInput([Sheet(0, 2, 0, 16)], [(1, 0)], b""), PIXELS[:1], "no crops"),
        (ImageInput([], [], b""), [], "no sheets"),
        (ImageInput([Sheet(1, 6, 8, 48)], [(1, 18)], b""), [bytes(1152)], "at most 5 crops, not 6"),
        (ImageInput([Sheet(2, 6, 16, 48)], [(1, 36)], b""), [bytes(2304)], "at most 2000 are accepted"),
    ],
    ids=str,
)
def test_pictures_that_do_not_fit_their_spec_are_refused(
    image: ImageInput, frames: list[bytes], words: str
) -> None:
    with pytest.raises(Refusal, match=words):
        built([image], frames, [5, 6, 7])


def test_more_pictures_than_announced_are_refused_with_the_bound() -> None:
    image: Any = ImageInput([Sheet(1, 1, 8, 8)], [(1, 3)], b"one")
    with pytest.raises(Refusal, match="3 pictures; at most 2 a request") as caught:
        built([image] * 3, [bytes(192)] * 3, [5, 6, 7])
    assert caught.value.code is ErrorCode.UNSUPPORTED
    with pytest.raises(Refusal, match="reads text only"):
        built([image], [bytes(192)], [5], ModelCard("m", "fake", 100, 97, 0, [0]))


FEATURES = FeatureFormat("bfloat16", 5, "w")


def encoded(
    places: list[int], frames: list[bytes], offered: FeatureFormat | None, taken: FeatureFormat | None
) -> Sequence:
    one = ImageInput([Sheet(1, 1, 8, 8)], [(1, 3)], b"one")
    two = ImageInput(TILES, [(1, 3), (2, 3), (2, 3)], b"two")
    message = Submit(1, 1, "r", pack_i32([5, 6, 7]), 4, images=[one, two], encoded=places, encoded_as=offered)
    return build_sequence(b"gateway", message, frames, CARD, 0.0, None, taken)


def test_an_encoded_picture_has_one_frame_and_costs_no_crops() -> None:
    seq = encoded([1], [bytes(192), bytes(90)], FEATURES, FEATURES)
    first, second = seq.pictures
    assert first.features is None and first.frames == [bytes(192)]
    assert second.features == bytes(90) and not second.frames
    assert crops_of(Chunk(seq, 0, seq.num_prompt, is_last=True)) == 1, "the first one's alone"
    assert encoded([0, 1], [bytes(30), bytes(90)], FEATURES, FEATURES).pictures[0].features == bytes(30)


@pytest.mark.parametrize(
    ("places", "frames", "offered", "taken", "words"),
    [
        ([1], [bytes(192), bytes(90)], FEATURES, None, "takes no encoded pictures"),
        ([1], [bytes(192), bytes(90)], FeatureFormat("bfloat16", 5, "v"), FEATURES, "by the weights v"),
        ([1], [bytes(192), bytes(90)], None, FEATURES, "of no format"),
        ([1], [bytes(192), bytes(89)], FEATURES, FEATURES, "wrong size"),
        ([1], [bytes(192), bytes(384), bytes(192)], FEATURES, FEATURES, "came with 3 frames"),
        ([2], [bytes(192), bytes(90)], FEATURES, FEATURES, "among 0 … 1"),
        ([-1], [bytes(192), bytes(90)], FEATURES, FEATURES, "among 0 … 1"),
    ],
)
def test_encoded_pictures_that_do_not_fit_are_refused(
    places: list[int],
    frames: list[bytes],
    offered: FeatureFormat | None,
    taken: FeatureFormat | None,
    words: str,
) -> None:
    with pytest.raises(Refusal, match=words):
        encoded(places, frames, offered, taken)
