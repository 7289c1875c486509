"""Owns the procedural scenes: what stands where, and how it is painted; runs in the drawing process.

Every random choice comes from one seeded generator, so a scene is a pure function of (seed, index).
Shapes are painted on a mask of their own at four times the size: antialiased, and cheap on large pictures.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pocket.network import VisionConfig
from pocket.tiling import picture_tiling

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (250, 140, 20),
    "yellow": (246, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (130, 50, 170),
    "pink": (250, 130, 185),
    "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLOR_NAMES = tuple(COLORS)
MAX_THINGS = 6

_SUPERSAMPLE = 4
_MIN_VISIBLE_PX = 11.0  # smaller than this in the sharpest crop, a diamond and a circle are the same blob
_MIN_CENTER_GAP = 0.14  # about one cell of the pooled grid, so that no cell holds two centres
_MIN_CONTRAST = 105.0  # euclidean distance in RGB between a shape and what is behind it


@dataclass(frozen=True)
class Thing:
    """One object: its names and its exact box as fractions of the picture."""

    color: str
    shape: str
    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def x(self) -> float:
        """Centre, 0 at the left."""
        return (self.x_min + self.x_max) / 2

    @property
    def y(self) -> float:
        """Centre, 0 at the top."""
        return (self.y_min + self.y_max) / 2

    @property
    def width(self) -> float:
        """Fraction of the picture's width."""
        return self.x_max - self.x_min

    @property
    def height(self) -> float:
        """Fraction of the picture's height."""
        return self.y_max - self.y_min

    @property
    def name(self) -> str:
        """Such as "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture (RGB) and its things, ordered from left to right."""

    picture: Image.Image
    things: tuple[Thing, ...]


def scene_rng(seed: int, index: int) -> Generator:
    """The generator that a scene and its questions draw from."""
    return np.random.default_rng([seed, index])


def draw_scene(
    rng: Generator,
    config: VisionConfig,
    single: float = 0.25,
    small: bool = False,
    max_things: int = MAX_THINGS,
) -> Scene:
    """Draw a scene; `single` is the share of pictures that one crop covers, `small` draws only small things."""
    width, height = _picture_size(rng, config, single)
    picture, behind = _background(rng, width, height)
    colors = [name for name, rgb in COLORS.items() if all(_distance(rgb, b) >= _MIN_CONTRAST for b in behind)]
    weights = np.array([1, 4, 4, 4, 4, 3, 2][: max_things + 1], dtype=float)
    count = int(rng.choice(len(weights), p=weights / weights.sum()))
    boxes = _place(rng, width, height, count, _scale(width, height, config), small)
    # Drawing from few names makes repeats, hence counting, "two red circles" and near misses, common.
    palette = rng.permutation(colors)[: int(rng.integers(1, len(colors) + 1))]
    shapes = rng.permutation(SHAPES)[: int(rng.integers(1, len(SHAPES) + 1))]
    pen = bool(rng.random() < 0.12)
    wobble = float(rng.choice([0.0, 0.0, 0.03, 0.06]))
    things = []
    for left, top, size in boxes:
        color, shape = str(rng.choice(palette)), str(rng.choice(shapes))
        things.append(_paint(rng, picture, color, shape, left, top, size, pen and size >= 24, wobble))
    picture = _spoil(rng, picture)
    return Scene(picture, tuple(sorted(things, key=lambda thing: thing.x)))


def _picture_size(rng: Generator, config: VisionConfig, single: float) -> tuple[int, int]:
    aspect = math.exp(abs(rng.normal(0, 0.45)))
    aspect = min(aspect, 4.0) if rng.random() < 0.85 else float(rng.uniform(2.0, 4.0))
    if rng.random() < single:
        short = float(rng.uniform(72, config.crop_size + 0.5))
    else:
        longest = 640.0 if rng.random() < 0.9 else 1024.0
        high = max(config.crop_size + 40.0, longest / aspect)
        short = math.exp(rng.uniform(math.log(config.crop_size + 1), math.log(high)))
    long = short * aspect
    size = (round(long), round(short))
    return size if rng.random() < 0.5 else (size[1], size[0])


def _scale(width: int, height: int, config: VisionConfig) -> tuple[float, float]:
    """Pixels of the sharpest crop per pixel of the picture, across and down."""
    margin = 2 * config.overlap_margin * config.enc_patch_size
    window = config.crop_size - margin
    tiles_h, tiles_w = picture_tiling(width, height, config)
    return (tiles_w * window + margin) / width, (tiles_h * window + margin) / height


def _place(
    rng: Generator, width: int, height: int, count: int, scale: tuple[float, float], small: bool
) -> list[tuple[float, float, float]]:
    """Left, top and size in pixels of up to `count` squares that hardly overlap."""
    short = min(width, height)
    least = max(_MIN_VISIBLE_PX / min(scale), 0.03 * short)
    most = max(least * 1.3, short * (0.62 if count <= 1 else 0.48 if count <= 3 else 0.36))
    if small:
        least, most = least, max(least * 1.2, 0.11 * short)
    alike = rng.random() < 0.3
    base = math.exp(rng.uniform(math.log(least), math.log(most)))
    placed: list[tuple[float, float, float]] = []
    for _ in range(count * 12):
        if len(placed) == count:
            break
        size = (
            base * float(rng.uniform(0.9, 1.1))
            if alike
            else math.exp(rng.uniform(math.log(least), math.log(most)))
        )
        size = min(size, short - 4.0)
        left = float(rng.uniform(1, width - size - 1))
        top = float(rng.uniform(1, height - size - 1))
        if all(_apart((left, top, size), other, width, height) for other in placed):
            placed.append((left, top, size))
    return placed


def _apart(a: tuple[float, float, float], b: tuple[float, float, float], width: int, height: int) -> bool:
    dx = abs(a[0] + a[2] / 2 - b[0] - b[2] / 2) / width
    dy = abs(a[1] + a[2] / 2 - b[1] - b[2] / 2) / height
    if max(dx, dy) < _MIN_CENTER_GAP:
        return False
    over_x = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    over_y = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return over_x <= 0 or over_y <= 0 or over_x * over_y <= 0.06 * min(a[2], b[2]) ** 2


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return math.dist(a, b)


def _background(rng: Generator, width: int, height: int) -> tuple[Image.Image, list[tuple[int, int, int]]]:
    """A picture to paint on, and the colours found in it."""
    first = _background_color(rng)
    kind = rng.random()
    if kind < 0.5:
        return Image.new("RGB", (width, height), first), [first]
    second = first
    if kind < 0.8:
        shift = rng.integers(-45, 46, 3) if rng.random() < 0.6 else np.full(3, int(rng.integers(-60, 61)))
        moved = np.clip(np.array(first) + shift, 0, 255)
        second = (int(moved[0]), int(moved[1]), int(moved[2]))
    if kind < 0.65:
        angle = rng.uniform(0, 2 * math.pi)
        across = np.linspace(-1, 1, width, dtype=np.float32) * math.cos(angle)
        down = np.linspace(-1, 1, height, dtype=np.float32) * math.sin(angle)
        mix = (down[:, None] + across[None, :]) / (2 * (abs(math.cos(angle)) + abs(math.sin(angle)))) + 0.5
    elif kind < 0.8:
        cells = rng.random((int(rng.integers(2, 12)), int(rng.integers(2, 12)))).astype(np.float32)
        how = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.NEAREST
        mix = np.clip(np.asarray(Image.fromarray(cells).resize((width, height), how)), 0, 1)
    else:
        mix = np.zeros((height, width), dtype=np.float32)
    pixels = np.array(first, dtype=np.float32) + mix[..., None] * (
        np.array(second, dtype=np.float32) - np.array(first, dtype=np.float32)
    )
    if kind >= 0.8:
        strength = float(rng.uniform(4, 28))
        grain = rng.normal(0, strength, (height, width, 3 if rng.random() < 0.5 else 1)).astype(np.float32)
        pixels = pixels + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), [first, second]


def _background_color(rng: Generator) -> tuple[int, int, int]:
    kind = rng.random()
    if kind < 0.3:
        return (255, 255, 255)
    if kind < 0.5:
        level = int(rng.integers(150, 256))
        rgb = np.clip(level + rng.integers(-8, 9, 3), 0, 255)
    elif kind < 0.65:
        level = int(rng.integers(20, 150))
        rgb = np.clip(level + rng.integers(-8, 9, 3), 0, 255)
    elif kind < 0.9:
        rgb = rng.integers(165, 256, 3)
    else:
        rgb = rng.integers(0, 256, 3)
    return (int(rgb[0]), int(rgb[1]), int(rgb[2]))


def _outline(rng: Generator, shape: str, wobble: float) -> NDArray[np.float64]:
    """Corners of a shape around the origin, (N, 2); about one unit in radius."""
    if shape == "circle":
        turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        points = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        tilt = 0.0
    elif shape == "square":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)
        tilt = float(rng.normal(0, 4))
    elif shape == "triangle":
        points = np.array([[0, -1], [0.95, 0.8], [-0.95, 0.8]], dtype=float)
        points[0, 0] += rng.uniform(-0.25, 0.25)
        tilt = float(rng.normal(0, 8)) + (180.0 if rng.random() < 0.12 else 0.0)
    elif shape == "star":
        turns = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
        points = np.stack([np.cos(turns) * radius, np.sin(turns) * radius], axis=1)
        tilt = float(rng.normal(0, 12))
    elif shape == "diamond":
        points = np.array([[0, -1], [0.8, 0], [0, 1], [-0.8, 0]], dtype=float)
        tilt = float(rng.normal(0, 4))
    else:
        arm = float(rng.uniform(0.28, 0.4))
        quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
        turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
        points = np.concatenate(
            [quarter, quarter @ turn, quarter @ turn @ turn, quarter @ turn @ turn @ turn]
        )
        tilt = float(rng.normal(0, 4))
    if wobble:
        points = _shake(rng, points, wobble)
    points = points * np.array([1.0, float(rng.uniform(0.86, 1.16))])
    angle = math.radians(tilt)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    turned: NDArray[np.float64] = points @ turn
    return turned


def _shake(rng: Generator, points: NDArray[np.float64], wobble: float) -> NDArray[np.float64]:
    """The outline as an unsteady hand draws it: more corners, each pushed by a slow wave."""
    nexts = np.roll(points, -1, axis=0)
    steps = np.linspace(0, 1, 6, endpoint=False)[None, :, None]
    dense = (points[:, None] * (1 - steps) + nexts[:, None] * steps).reshape(-1, 2)
    turns = np.linspace(0, 2 * math.pi, len(dense), endpoint=False)
    push = np.zeros_like(dense)
    for wave in (2, 3, 5):
        phase = rng.uniform(0, 2 * math.pi, 2)
        push += wobble / 1.7 * np.sin(turns[:, None] * wave + phase[None, :])
    return dense + push


def _paint(
    rng: Generator,
    picture: Image.Image,
    color: str,
    shape: str,
    left: float,
    top: float,
    size: float,
    pen: bool,
    wobble: float,
) -> Thing:
    points = _outline(rng, shape, wobble)
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - low) * (size / (high - low).max())
    extent = points.max(axis=0)
    offset = np.array([left, top]) + (size - extent) / 2
    points = points + offset
    x0, y0 = math.floor(points[:, 0].min()) - 1, math.floor(points[:, 1].min()) - 1
    x1, y1 = math.ceil(points[:, 0].max()) + 1, math.ceil(points[:, 1].max()) + 1
    mask = Image.new("L", ((x1 - x0) * _SUPERSAMPLE, (y1 - y0) * _SUPERSAMPLE), 0)
    brush = ImageDraw.Draw(mask)
    scaled = (points - np.array([x0, y0])) * _SUPERSAMPLE
    brush.polygon([(float(x), float(y)) for x, y in scaled], fill=255)
    if pen:
        middle = (scaled.min(axis=0) + scaled.max(axis=0)) / 2
        hollow = middle + (scaled - middle) * float(rng.uniform(0.45, 0.72))
        if shape != "cross":
            brush.polygon([(float(x), float(y)) for x, y in hollow], fill=0)
    small = mask.reduce(_SUPERSAMPLE)
    jitter = rng.normal(0, 9, 3)
    rgb = np.clip(np.array(COLORS[color]) * float(rng.uniform(0.92, 1.06)) + jitter, 0, 255).astype(int)
    fill: Image.Image = Image.new("RGB", small.size, (int(rgb[0]), int(rgb[1]), int(rgb[2])))
    if rng.random() < 0.2:
        shade = rng.uniform(-28, 28) * np.linspace(-1, 1, small.size[1])[:, None, None]
        fill = Image.fromarray(np.clip(np.asarray(fill) + shade, 0, 255).astype(np.uint8))
    picture.paste(fill, (x0, y0), small)
    if not pen and rng.random() < 0.12:
        edge = tuple(int(v) for v in (np.array(rgb) * 0.5))
        draw = ImageDraw.Draw(picture)
        draw.line(
            [(float(x), float(y)) for x, y in [*points, points[0]]], fill=edge, width=max(1, int(size * 0.03))
        )
    width, height = picture.size
    return Thing(
        color,
        shape,
        max(0.0, float(points[:, 0].min()) / width),
        max(0.0, float(points[:, 1].min()) / height),
        min(1.0, float(points[:, 0].max()) / width),
        min(1.0, float(points[:, 1].max()) / height),
    )


def _spoil(rng: Generator, picture: Image.Image) -> Image.Image:
    """What cameras, scalers and encoders do to a picture."""
    if rng.random() < 0.08:
        picture = picture.filter(
            ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.006 * min(picture.size) + 0.3)))
        )
    if rng.random() < 0.12:
        grain = rng.normal(0, rng.uniform(2, 12), (picture.height, picture.width, 1)).astype(np.float32)
        picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        held = io.BytesIO()
        picture.save(held, "JPEG", quality=int(rng.integers(40, 96)))
        held.seek(0)
        picture = Image.open(held).convert("RGB")
    return picture
