"""Outlines as they are decoded: the box, each command as soon as it is whole, and what is no path."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decisions.outlines import NUMBERS, Outline, OutlineMarks
from gateway.generation import Delta, SpatialObject

COORD, SIZE = 5, 6
WORDS = [
    "",
    "<mark>",
    *"MmLlHhVvCcSsQqTtZz",
    "-",
    *map(str, range(0, 1000, 8)),
    "x",
    " 960",
    "1000",
    "½",
    "A",
]
IDS = {word: 10 + i for i, word in enumerate(WORDS)}


def text(token_id: int) -> str:
    word = WORDS[token_id - 10]
    return "" if word == "<mark>" else word


def outline() -> Outline:
    return Outline(OutlineMarks(COORD, SIZE, text))


def read(path: str, reader: Outline | None = None) -> list[str]:
    reader = reader or outline()
    found = [reader.take(IDS[word], None, i) for i, word in enumerate(path.split(" "))]
    assert all(one is None or isinstance(one, Delta) for one in found)
    return ["" if one is None else one.text for one in found if isinstance(one, Delta) or one is None]


def test_box_then_path() -> None:
    reader = outline()
    assert reader.take(COORD, [0.5, 0.0], 0) is None
    assert reader.take(COORD, [0.25, 0.0], 1) is None
    assert reader.take(SIZE, [0.5, 0.125], 2) == SpatialObject(0.5, 0.25, 0.5, 0.125)
    assert reader.take(COORD, [0.75, 0.0], 3) is None and reader.take(SIZE, [0.5, 0.5], 4) is None
    found = read("M 0 728 L 480 - 96 C 8 16 24 32 40 48 z", reader)
    assert [piece for piece in found if piece] == [
        "M 0 0.758",
        " L 0.5 -0.1",
        " C 0.008 0.017 0.025 0.033 0.042 0.05",
        " z",
    ]
    assert found[2] and found[6] and found[-1] and not found[1], "a command is told with its last number"


def test_numbers_that_go_on_repeat_the_command() -> None:
    assert "".join(read("m 96 96 192 0 h 96 480 v - 96 Z")) == "m 0.1 0.1 l 0.2 0 h 0.1 h 0.5 v -0.1 Z"


def test_texts_are_read_without_the_space_around_them() -> None:
    reader = outline()
    assert [reader.take(IDS[word], None, 0) for word in ("M", "", "<mark>", "0")] == [None] * 4
    found = reader.take(10 + WORDS.index(" 960"), None, 4)
    assert isinstance(found, Delta) and found.text == "M 0 1"


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("L 0 0 M 8 8", ""),
        ("0 0", ""),
        ("M 0 0 x L 8 8", "M 0 0"),
        ("M 0 0 L 8 L 8 8", "M 0 0"),
        ("M 0 0 L 8 - - 8", "M 0 0"),
        ("M 0 0 L 8 - L 8 8", "M 0 0"),
        ("M 0 0 z 8 L 8 8", "M 0 0 z"),
        ("M 0 0 A 8 8 0 8 8", "M 0 0"),
        ("M 0 0 L ½ 8", "M 0 0"),
        ("M 0 0 L 8", "M 0 0"),
        ("M - 0 0", "M 0 0"),
    ],
)
def test_what_is_no_path_ends_it(path: str, kept: str) -> None:
    assert "".join(read(path)) == kept


@pytest.mark.parametrize("values", [None, [], [math.nan, 2.0], [-1.0, 0.5]])
def test_boxes_from_any_values(values: list[float] | None) -> None:
    reader = outline()
    for token_id in (SIZE, COORD, COORD, COORD, SIZE):
        found = reader.take(token_id, values, 0)
    if not values:
        assert found is None
    else:
        assert isinstance(found, SpatialObject)
        assert all(0.0 <= side <= 1.0 for side in found.box().values())


@given(st.lists(st.sampled_from(range(len(WORDS)))))
def test_any_tokens_give_a_path_or_none(words: list[int]) -> None:
    """Whatever is decoded: whole commands with as many numbers as they take, the first of them a move."""
    reader = outline()
    found = (reader.take(10 + word, None, i) for i, word in enumerate(words))
    path = "".join(one.text for one in found if isinstance(one, Delta)).split(" ")
    at = 0
    while path != [""] and at < len(path):
        command = path[at]
        assert at or command in "Mm"
        numbers = path[at + 1 : at + 1 + NUMBERS[command.upper()]]
        assert len(numbers) == NUMBERS[command.upper()] and all(math.isfinite(float(one)) for one in numbers)
        at += 1 + len(numbers)
