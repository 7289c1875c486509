"""Owns turning scenes into training batches and feeding them; `feed` runs in the drawing process, `Feed` reads it.

Several questions share one picture: a row is [BOS, image tokens, question 1, question 2, ...], each question
blind to the others, with positions that restart after the image. Batch i is a pure function of (seed, i).
"""

import math
import multiprocessing
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from safetensors.numpy import load, save
from tokenizers import Tokenizer

from pocket.network import NetworkConfig, VisionConfig
from pocket.phrases import Ask
from pocket.questions import KINDS, NO_PICTURE_ANSWER, Questioner
from pocket.scenes import COLOR_NAMES, SHAPES, Scene, Thing, draw_scene, scene_rng
from pocket.tiling import cut_crops
from pocket.tokenizer import ANSWER_ID, COORD_ID, EOS_ID, SIZE_ID, load_tokenizer

BINS = 1024
_KIND_WEIGHTS = {
    "what": 0.7, "color": 1.0, "shape": 1.0, "count": 2.0, "where": 1.3, "exists": 0.6, "side": 0.9, "beside": 1.3,
    "extreme": 0.7, "at": 0.7, "detect": 1.7, "point": 1.1, "caption short": 0.35, "caption normal": 0.45,
    "caption long": 0.12,
}  # fmt: skip
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class BatchPlan:
    """What a run's batches look like; the drawing process gets this and nothing else."""

    seed: int
    num_pictures: int = 24
    num_positions: int = 144
    encoder_batches: int = 0  # this many first batches ask nothing, and hold mostly pictures of one crop
    encoder_single: float = 0.6
    single: float = 0.2


@dataclass
class Segment:
    """One question and its answer as token positions; see `fill_row` for the arrays' meaning."""

    ids: list[int]
    kinds: list[int]  # 0 a token, 1 a coordinate value, 2 a size value
    values: list[tuple[float, float]]
    tokens: list[int]  # next token to predict, −1 for none
    coords: list[int]  # coordinate bin to predict, −1 for none
    sizes: list[tuple[int, int]]  # size bins to predict, (−1, −1) for none
    weight: float
    sees_picture: bool = True


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


def make_segment(ask: Ask, tokenizer: Tokenizer, templates: Mapping[str, Any], rng: Generator) -> Segment:
    """The teacher-forced positions of a question."""
    # Now and then only one answer mark: both forms are in use among Moondream's implementations.
    marks = 1 if rng.random() < 0.2 else 2
    ids = prompt_ids(ask.task, ask.text, tokenizer, templates, marks)
    if ask.task in ("query", "caption"):
        answer = tokenizer.encode(ask.answer).ids
        known = ids + answer
        tokens = [-1] * (len(ids) - 1) + answer + [EOS_ID]
        count = len(known)
        weight = 1.0 if ask.task == "query" else 0.5
        return Segment(
            known, [0] * count, [(0.0, 0.0)] * count, tokens, [-1] * count, [(-1, -1)] * count, weight
        )
    count = len(ids)
    segment = Segment(
        ids,
        [0] * count,
        [(0.0, 0.0)] * count,
        [-1] * (count - 1),
        [-1] * (count - 1),
        [(-1, -1)] * count,
        1.0,
    )
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


def draw_segments(
    scene: Scene, rng: Generator, tokenizer: Tokenizer, templates: Mapping[str, Any], room: int
) -> list[Segment]:
    """Random questions about a scene that fit into `room` positions together."""
    questioner = Questioner(scene, rng)
    weights = np.array([_KIND_WEIGHTS[k] for k in KINDS])
    segments: list[Segment] = []
    for pick in rng.choice(len(KINDS), size=28, p=weights / weights.sum()):
        ask = questioner.draw(KINDS[int(pick)])
        if ask is None:
            continue
        segment = make_segment(ask, tokenizer, templates, rng)
        if ask.task == "query" and rng.random() < 0.012:
            lone = Ask("query", "no picture", ask.text, NO_PICTURE_ANSWER)
            segment = make_segment(lone, tokenizer, templates, rng)
            # Without a picture the sequence brings its own BOS.
            segment.ids.insert(0, EOS_ID)
            for values in (segment.kinds, segment.tokens, segment.coords):
                values.insert(0, -1)
            segment.kinds[0] = 0
            segment.values.insert(0, (0.0, 0.0))
            segment.sizes.insert(0, (-1, -1))
            segment.sees_picture = False
        if len(segment.ids) <= room:
            segments.append(segment)
            room -= len(segment.ids)
        if room < 12:
            break
    return segments


def empty_rows(num_rows: int, num_positions: int) -> Arrays:
    """Arrays of a batch's text positions, shapes (rows, positions) or with a last axis of 2."""
    shape = (num_rows, num_positions)
    return {
        "ids": np.zeros(shape, np.int64),
        "kinds": np.zeros(shape, np.int8),
        "values": np.zeros((*shape, 2), np.float32),
        "positions": np.zeros(shape, np.int64),
        "segments": np.zeros(shape, np.int64),  # 0 padding, negative: blind to the picture
        "tokens": np.full(shape, -1, np.int64),
        "coords": np.full(shape, -1, np.int64),
        "sizes": np.full((*shape, 2), -1, np.int64),
        "weights": np.zeros(shape, np.float32),
    }


def fill_row(rows: Arrays, row: int, segments: list[Segment], num_prefix: int) -> None:
    """Lay segments one after another into a row."""
    start = 0
    for number, segment in enumerate(segments, 1):
        count = len(segment.ids)
        where = slice(start, start + count)
        rows["ids"][row, where] = segment.ids
        rows["kinds"][row, where] = segment.kinds
        rows["values"][row, where] = segment.values
        rows["positions"][row, where] = np.arange(count) + (num_prefix if segment.sees_picture else 0)
        rows["segments"][row, where] = number if segment.sees_picture else -number
        rows["tokens"][row, where] = segment.tokens
        rows["coords"][row, where] = segment.coords
        rows["sizes"][row, where] = segment.sizes
        rows["weights"][row, where] = segment.weight
        start += count


def cover_labels(
    things: tuple[Thing, ...], view: tuple[float, float, float, float], grid: int
) -> tuple[Any, Any]:
    """What covers each patch of a view (left, top, width, height in picture fractions).

    Returns classes int64 (grid², 2), colour and shape with 0 for none, and float32 (grid², 6): the thing's
    centre relative to the patch's in view sides, log2 of its size in view sides, and its centre in the view.
    """
    left, top, width, height = view
    classes = np.zeros((grid, grid, 2), np.int64)
    shapes = np.zeros((grid, grid, 6), np.float32)
    centers = (np.arange(grid) + 0.5) / grid
    for thing in sorted(things, key=lambda t: -t.width * t.height):
        x0, x1 = (thing.x_min - left) / width, (thing.x_max - left) / width
        y0, y1 = (thing.y_min - top) / height, (thing.y_max - top) / height
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        hit = ((centers >= y0) & (centers <= y1))[:, None] & ((centers >= x0) & (centers <= x1))[None, :]
        if 0 <= x < 1 and 0 <= y < 1:
            hit[int(y * grid), int(x * grid)] = True
        classes[hit] = (COLOR_NAMES.index(thing.color) + 1, SHAPES.index(thing.shape) + 1)
        rows, cols = np.nonzero(hit)
        offset = np.stack([x - centers[cols], y - centers[rows]], axis=1)
        whole = [np.log2(max(x1 - x0, 1e-3)), np.log2(max(y1 - y0, 1e-3)), x, y]
        shapes[hit] = np.concatenate([offset, np.tile(whole, (len(rows), 1))], axis=1)
    return classes.reshape(-1, 2), shapes.reshape(-1, 6)


def center_labels(things: tuple[Thing, ...], grid: int) -> tuple[Any, Any]:
    """Which thing's centre lies in each cell of the pooled grid; arrays as in `cover_labels`."""
    classes = np.zeros((grid, grid, 2), np.int64)
    shapes = np.zeros((grid, grid, 6), np.float32)
    for thing in things:
        col, row = min(grid - 1, int(thing.x * grid)), min(grid - 1, int(thing.y * grid))
        classes[row, col] = (COLOR_NAMES.index(thing.color) + 1, SHAPES.index(thing.shape) + 1)
        offset = (thing.x * grid - col - 0.5, thing.y * grid - row - 0.5)
        shapes[row, col] = (*offset, np.log2(thing.width), np.log2(thing.height), thing.x, thing.y)
    return classes.reshape(-1, 2), shapes.reshape(-1, 6)


def crop_views(tiling: tuple[int, int], config: VisionConfig) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of each encoded crop in fractions of the picture, in crop order."""
    views = [(0.0, 0.0, 1.0, 1.0)]
    if tiling == (1, 1):
        return views
    margin = 2 * config.overlap_margin * config.enc_patch_size
    window = config.crop_size - margin
    height, width = tiling[0] * window + margin, tiling[1] * window + margin
    for y in range(tiling[0]):
        views += [
            (x * window / width, y * window / height, config.crop_size / width, config.crop_size / height)
            for x in range(tiling[1])
        ]
    return views


def draw_batch(index: int, plan: BatchPlan, config: NetworkConfig, tokenizer: Tokenizer) -> Arrays:
    """Batch `index` of a run: crops uint8 (N, S, S, 3), tilings (B, 2), text rows and the auxiliary labels."""
    arrays = empty_rows(plan.num_pictures, plan.num_positions)
    crops, tilings, patches, cells = [], [], [], []
    grid = config.vision.grid
    for row in range(plan.num_pictures):
        rng = scene_rng(plan.seed, index * plan.num_pictures + row)
        single = plan.encoder_single if index < plan.encoder_batches else plan.single
        scene = draw_scene(rng, config.vision, single, small=bool(rng.random() < 0.1))
        cut, tiling = cut_crops(scene.picture, config.vision)
        crops.append(cut)
        tilings.append(tiling)
        patches += [cover_labels(scene.things, view, grid) for view in crop_views(tiling, config.vision)]
        cells.append(center_labels(scene.things, grid))
        templates = config.tokenizer["templates"]
        if index >= plan.encoder_batches:
            segments = draw_segments(scene, rng, tokenizer, templates, plan.num_positions)
            fill_row(arrays, row, segments, config.num_prefix)
    return {
        **arrays,
        "crops": np.concatenate(crops),
        "tilings": np.array(tilings, np.int64),
        "patch_classes": np.stack([p[0] for p in patches]),
        "patch_shapes": np.stack([p[1] for p in patches]),
        "cell_classes": np.stack([c[0] for c in cells]),
        "cell_shapes": np.stack([c[1] for c in cells]),
    }


def feed(sink: Connection, first: int, plan: BatchPlan, config_path: str, tokenizer_path: str) -> None:
    """Draw batches from `first` on for ever; ends when the reader goes away."""
    os.nice(5)
    config = NetworkConfig.read(Path(config_path))
    tokenizer = load_tokenizer(Path(tokenizer_path))
    index = first
    try:
        while True:
            sink.send_bytes(save(draw_batch(index, plan, config, tokenizer)))
            index += 1
    except (BrokenPipeError, KeyboardInterrupt):
        return


class Feed:
    """The trainer's end: a process draws ahead, a thread keeps a few batches at hand."""

    def __init__(
        self, first: int, plan: BatchPlan, config_path: Path, tokenizer_path: Path, depth: int = 12
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._source, sink = context.Pipe(duplex=False)
        self._process = context.Process(
            target=feed, args=(sink, first, plan, str(config_path), str(tokenizer_path)), daemon=True
        )
        self._process.start()
        sink.close()
        self._ready: queue.Queue[bytes] = queue.Queue(depth)
        self._closed = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while not self._closed:
                self._ready.put(self._source.recv_bytes())
        except (EOFError, OSError):
            return

    @property
    def num_ready(self) -> int:
        """Batches drawn and not yet taken."""
        return self._ready.qsize()

    def take(self) -> Arrays:
        """The next batch, in order."""
        while True:
            try:
                arrays: Arrays = load(self._ready.get(timeout=5))
                return arrays
            except queue.Empty:
                if not self._process.is_alive():
                    raise RuntimeError(
                        f"the drawing process ended with code {self._process.exitcode}"
                    ) from None

    def close(self) -> None:
        """Stop the drawing process."""
        self._closed = True
        self._process.terminate()
        self._process.join(5)
