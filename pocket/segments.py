"""Owns a row of training: pictures, questions and answers as token positions, each knowing what it stands behind.

A row is a forest of segments. A segment sees all segments it stands behind, from its parent to the row's first, and itself:
a picture both ways, text causally. So many questions share one picture, and many follow-ups one question, while each path
from the first segment to a last one is exactly the sequence that a conversation is served as. Drawing process.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pocket.phrases import Ask
from pocket.scenes import Thing
from pocket.tokenizer import ANSWER_ID, COORD_ID, EOS_ID, SIZE_ID

BINS = 1024
MAX_SEGMENTS = 48
Arrays = dict[str, NDArray[Any]]


@dataclass
class Segment:
    """A picture, or one question and its answer, as token positions."""

    ids: list[int]
    kinds: list[int]  # 0 a token, 1 a coordinate value, 2 a size value, 3 a position of a picture
    values: list[tuple[float, float]]
    tokens: list[int]  # next token to predict, −1 for none
    coords: list[int]  # coordinate bin to predict, −1 for none
    sizes: list[tuple[int, int]]  # size bins to predict, (−1, −1) for none
    weight: float
    parent: int | None = None  # the row's segment that it stands behind; None: a sequence of its own
    both_ways: bool = False  # its positions see each other, as a picture's do


def coord_bin(value: float) -> int:
    """Bin of a coordinate in [0, 1]; its value is bin/1024."""
    return min(BINS - 1, max(0, round(value * BINS)))


def size_bin(value: float) -> int:
    """Bin of a size in (0, 1]; its value is 2^(bin/1023·10 − 10)."""
    return min(BINS - 1, max(0, round((math.log2(max(value, 2.0**-10)) + 10.0) / 10.0 * (BINS - 1))))


def prompt_ids(
    ask_task: str, text: str, tokenizer: Tokenizer, templates: Mapping[str, Any], num_answer_marks: int = 2
) -> list[int]:
    """Prompt after BOS and the image; a query ends with the suffix and the answer mark."""
    template = templates[ask_task]
    if ask_task == "caption":
        return list(template[text])
    if ask_task == "query":
        return [*template["prefix"], *tokenizer.encode(text).ids, *[ANSWER_ID] * num_answer_marks]
    return [*template["prefix"], *tokenizer.encode(" " + text).ids, *template["suffix"]]


def _blank(ids: list[int], kind: int = 0, weight: float = 1.0) -> Segment:
    """Positions that predict nothing."""
    count = len(ids)
    nothing = [-1] * count
    return Segment(ids, [kind] * count, [(0.0, 0.0)] * count, nothing, [*nothing], [(-1, -1)] * count, weight)


def opened(segment: Segment) -> Segment:
    """The segment as the first of its sequence: with BOS in front, in place."""
    start = _blank([EOS_ID])
    for name in ("ids", "kinds", "values", "tokens", "coords", "sizes"):
        getattr(segment, name)[:0] = getattr(start, name)
    segment.parent = None
    return segment


def picture_segment(num_tokens: int, parent: int | None = None) -> Segment:
    """A picture's positions; the first picture of a sequence begins with BOS, which sees it and is seen both ways."""
    segment = _blank([EOS_ID] * num_tokens, 3)
    segment.parent, segment.both_ways = parent, True
    return segment if parent is not None else opened(segment)


def make_segment(
    ask: Ask, tokenizer: Tokenizer, templates: Mapping[str, Any], rng: Generator, parent: int | None = None
) -> Segment:
    """The teacher-forced positions of a question behind the row's segment `parent`."""
    # Now and then only one answer mark: both forms are in use among Moondream's implementations.
    marks = 1 if rng.random() < 0.2 else 2
    ids = prompt_ids(ask.task, ask.text, tokenizer, templates, marks)
    if ask.task in ("query", "caption"):
        answer = tokenizer.encode(ask.answer).ids
        known = ids + answer
        tokens = [-1] * (len(ids) - 1) + answer + [EOS_ID]
        segment = _blank(known, weight=1.0 if ask.task == "query" else 0.5)
        segment.tokens, segment.parent = tokens, parent
        return segment
    segment = _blank(ids)
    segment.parent = parent
    segment.tokens.pop()
    segment.coords.pop()
    for thing in ask.targets:
        _append_target(segment, thing, ask.task == "detect")
    segment.tokens.append(EOS_ID)
    segment.coords.append(-1)
    return segment


def _append_target(segment: Segment, thing: Thing, with_size: bool) -> None:
    x, y = coord_bin(thing.x), coord_bin(thing.y)
    segment.tokens += [COORD_ID, -1]
    segment.coords += [x, y]
    segment.ids += [COORD_ID, COORD_ID]
    segment.kinds += [1, 1]
    segment.values += [(x / BINS, 0.0), (y / BINS, 0.0)]
    segment.sizes += [(-1, -1), (-1, -1)]
    if with_size:
        width, height = size_bin(thing.width), size_bin(thing.height)
        segment.sizes[-1] = (width, height)
        segment.tokens.append(-1)
        segment.coords.append(-1)
        segment.ids.append(SIZE_ID)
        segment.kinds.append(2)
        segment.values.append((2.0 ** (width / 1023 * 10 - 10), 2.0 ** (height / 1023 * 10 - 10)))
        segment.sizes.append((-1, -1))


def empty_rows(num_rows: int, num_positions: int) -> Arrays:
    """Arrays of a batch's positions, shapes (rows, positions) or with a last axis of 2, and of what segments see."""
    shape = (num_rows, num_positions)
    return {
        "ids": np.zeros(shape, np.int64),
        "kinds": np.zeros(shape, np.int8),
        "values": np.zeros((*shape, 2), np.float32),
        "positions": np.zeros(shape, np.int64),
        "segments": np.zeros(shape, np.int64),  # counted from 1; 0 is padding
        "tokens": np.full(shape, -1, np.int64),
        "coords": np.full(shape, -1, np.int64),
        "sizes": np.full((*shape, 2), -1, np.int64),
        "weights": np.zeros(shape, np.float32),
        # [row, i, j]: segment i sees all of segment j; itself where it attends both ways.
        "sees": np.zeros((num_rows, MAX_SEGMENTS + 1, MAX_SEGMENTS + 1), np.bool_),
    }


def fill_row(rows: Arrays, row: int, segments: list[Segment]) -> None:
    """Lay segments one after another into a row; each goes on from the position where its parent ends."""
    start = 0
    ends: list[int] = []  # positions of a sequence up to the end of each segment
    for number, segment in enumerate(segments, 1):
        count = len(segment.ids)
        where = slice(start, start + count)
        first = 0 if segment.parent is None else ends[segment.parent]
        ends.append(first + count)
        rows["ids"][row, where] = segment.ids
        rows["kinds"][row, where] = segment.kinds
        rows["values"][row, where] = segment.values
        rows["positions"][row, where] = np.arange(first, first + count)
        rows["segments"][row, where] = number
        rows["tokens"][row, where] = segment.tokens
        rows["coords"][row, where] = segment.coords
        rows["sizes"][row, where] = segment.sizes
        rows["weights"][row, where] = segment.weight
        if segment.parent is not None:
            rows["sees"][row, number] = rows["sees"][row, segment.parent + 1]
            rows["sees"][row, number, segment.parent + 1] = True
        rows["sees"][row, number, number] = segment.both_ways
        start += count
