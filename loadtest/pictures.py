"""Owns the small pictures the load test asks about. Runs once, before any measurement.

They are drawn here, not by `pocket`'s scenes, because the load test imports nothing else of ours.
"""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw

COLOURS: Final = {
    "red": (214, 48, 49),
    "green": (39, 148, 84),
    "blue": (45, 98, 214),
    "yellow": (240, 196, 25),
    "purple": (126, 66, 190),
    "orange": (236, 122, 28),
}
SHAPES: Final = ("circle", "square", "triangle")
BACKGROUNDS: Final = ((245, 245, 245), (30, 34, 40), (210, 222, 235), (225, 215, 200))


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawn scene as a data URL, with questions that make sense about it."""

    data_url: str
    num_bytes: int
    questions: tuple[str, ...]


def draw_picture(seed: int, *, size_px: int = 128, height_px: int = 0) -> Picture:
    """Draw one to four shapes, one to a quarter so that none hides another. Equal seeds give equal bytes.

    `height_px` 0: a square; otherwise the picture is cut at this height.
    """
    rng = random.Random(seed)
    image = Image.new("RGB", (size_px, size_px), rng.choice(BACKGROUNDS))
    draw = ImageDraw.Draw(image)
    half = size_px // 2
    named: list[str] = []
    for quarter in rng.sample(range(4), rng.randint(1, 4)):
        colour, shape = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        radius = rng.randint(size_px // 10, size_px // 5)
        x = (quarter % 2) * half + rng.randint(radius, half - radius)
        y = (quarter // 2) * half + rng.randint(radius, half - radius)
        _draw_shape(draw, shape, x, y, radius, COLOURS[colour])
        named.append(f"{colour} {shape}")
    if height_px:
        image = image.crop((0, 0, size_px, height_px))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    return Picture(
        data_url="data:image/png;base64," + base64.b64encode(data).decode(),
        num_bytes=len(data),
        questions=_questions(named, rng),
    )


def draw_pictures(count: int, seed: int, *, size_px: int = 128, height_px: int = 0) -> list[Picture]:
    """`count` different pictures."""
    seeds = range(seed * 1_000_003, seed * 1_000_003 + count)
    return [draw_picture(own, size_px=size_px, height_px=height_px) for own in seeds]


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, fill: tuple[int, int, int]
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)


def _questions(named: list[str], rng: random.Random) -> tuple[str, ...]:
    colour, shape = rng.choice(named).split()
    return (
        "What is in the picture?",
        "How many shapes are there?",
        f"What colour is the {shape}?",
        f"Is there a {colour} {shape}?",
        f"Where is the {colour} {shape}?",
    )
