"""Owns turning scenes into training batches and feeding them; `feed` runs in the drawing process, `Feed` reads it.

Batch i is a pure function of (seed, i). What stands in a row: `pocket.rows`.
"""

import multiprocessing
import os
import queue
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save
from tokenizers import Tokenizer

from pocket.network import NetworkConfig, VisionConfig
from pocket.rows import RowDrawing
from pocket.scenes import COLOR_NAMES, SHAPES, Thing, draw_scene, scene_rng
from pocket.segments import Arrays, empty_rows, fill_row
from pocket.tiling import cut_crops
from pocket.tokenizer import load_tokenizer


@dataclass(frozen=True)
class BatchPlan:
    """What a run's batches look like; the drawing process gets this and nothing else."""

    seed: int
    num_pictures: int = 24
    num_pairs: int = 6  # rows of two pictures; the others have one
    num_positions: int = 224  # of a row, its pictures among them
    encoder_batches: int = 0  # this many first batches ask nothing, and hold mostly pictures of one crop
    encoder_single: float = 0.6
    single: float = 0.2


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
    """Batch `index` of a run: crops uint8 (N, S, S, 3), tilings (pictures, 2), rows and the auxiliary labels.

    A row's pictures follow one another, in the order of the rows.
    """
    num_rows = plan.num_pictures - plan.num_pairs
    arrays = empty_rows(num_rows, plan.num_positions)
    crops, tilings, patches, cells = [], [], [], []
    grid = config.vision.grid
    picture = 0
    for row in range(num_rows):
        scenes = []
        for _ in range(2 if row >= num_rows - plan.num_pairs else 1):
            rng = scene_rng(plan.seed, index * plan.num_pictures + picture)
            picture += 1
            single = plan.encoder_single if index < plan.encoder_batches else plan.single
            scene = draw_scene(rng, config.vision, single, small=bool(rng.random() < 0.1))
            cut, tiling = cut_crops(scene.picture, config.vision)
            crops.append(cut)
            tilings.append(tiling)
            patches += [cover_labels(scene.things, view, grid) for view in crop_views(tiling, config.vision)]
            cells.append(center_labels(scene.things, grid))
            scenes.append(scene)
        if index >= plan.encoder_batches:
            drawing = RowDrawing(rng, tokenizer, config, plan.num_positions)
            segments = drawing.one(scenes[0]) if len(scenes) == 1 else drawing.two(scenes[0], scenes[1])
            fill_row(arrays, row, segments)
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
