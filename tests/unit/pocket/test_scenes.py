"""Scenes, questions and crops: pure functions of a seed. Test process."""

from collections import Counter

import numpy as np
import pytest

from pocket.network import VisionConfig
from pocket.phrases import matching, place_of
from pocket.questions import KINDS, Questioner
from pocket.scenes import MAX_THINGS, Thing, draw_scene, scene_rng
from pocket.tiling import cut_crops, picture_tiling

VISION = VisionConfig(crop_size=98, overlap_margin=1, max_crops=6)


def test_a_scene_and_its_questions_follow_from_the_seed() -> None:
    def draw(index: int) -> tuple[object, ...]:
        rng = scene_rng(3, index)
        scene = draw_scene(rng, VISION)
        asks = [Questioner(scene, rng).draw(kind) for kind in KINDS]
        return scene.picture.tobytes(), scene.things, asks

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


@pytest.mark.slow
def test_boxes_lie_inside_the_picture_and_hold_their_thing() -> None:
    counts: Counter[int] = Counter()
    for index in range(60):
        scene = draw_scene(scene_rng(4, index), VISION)
        counts[len(scene.things)] += 1
        assert len(scene.things) <= MAX_THINGS
        assert list(scene.things) == sorted(scene.things, key=lambda t: t.x)
        pixels = np.asarray(scene.picture, dtype=float)
        for thing in scene.things:
            assert 0 <= thing.x_min < thing.x_max <= 1
            assert 0 <= thing.y_min < thing.y_max <= 1
        if len(scene.things) == 1:  # what differs most from the corner stands inside the box
            thing = scene.things[0]
            changed = np.abs(pixels - pixels[:3, :3].mean((0, 1))).sum(2)
            y, x = np.unravel_index(int(changed.argmax()), changed.shape)
            assert thing.x_min - 0.06 <= x / scene.picture.width <= thing.x_max + 0.06
            assert thing.y_min - 0.06 <= y / scene.picture.height <= thing.y_max + 0.06
    assert set(counts) >= {1, 2, 3, 4, 5}


@pytest.mark.slow
def test_answers_are_true_of_the_scene() -> None:
    for index in range(40):
        rng = scene_rng(5, index)
        scene = draw_scene(rng, VISION)
        questioner = Questioner(scene, rng)
        for _ in range(3):
            ask = questioner.draw("count")
            assert ask is not None and 0 <= int(ask.answer) <= len(scene.things)
            found = questioner.draw("detect")
            assert found is not None
            assert set(found.targets) <= set(scene.things)
            shape = questioner.draw("shape")
            if shape is not None and " " not in shape.answer:
                assert any(t.shape == shape.answer for t in scene.things)
            what = questioner.draw("what")
            assert what is not None
            assert all(thing.name in what.answer for thing in scene.things)


def test_places_near_a_border_have_no_name() -> None:
    def at(x: float, y: float) -> Thing:
        return Thing("red", "circle", x - 0.05, y - 0.05, x + 0.05, y + 0.05)

    assert place_of(at(0.1, 0.1)) == "top left"
    assert place_of(at(0.5, 0.5)) == "center"
    assert place_of(at(0.5, 0.9)) == "bottom"
    assert place_of(at(0.34, 0.5)) is None
    assert matching((at(0.5, 0.5),), "blue", None) == ()


@pytest.mark.parametrize(
    ("size", "tiling"),
    [
        ((98, 98), (1, 1)),
        ((400, 90), (1, 1)),
        ((400, 400), (2, 2)),
        ((640, 480), (2, 2)),
        ((1024, 256), (1, 4)),
    ],
)
def test_tiling_of_common_sizes(size: tuple[int, int], tiling: tuple[int, int]) -> None:
    assert picture_tiling(*size, VISION) == tiling


def test_crops_are_the_whole_picture_then_the_tiles() -> None:
    scene = draw_scene(scene_rng(6, 0), VISION, single=0.0)
    crops, tiling = cut_crops(scene.picture, VISION)
    assert crops.shape == (1 + tiling[0] * tiling[1], 98, 98, 3)
    assert crops.dtype == np.uint8
