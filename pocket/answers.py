"""Owns what is asked of a model about a picture, and the shapes of its replies. Any process."""

from dataclasses import dataclass
from typing import Literal

from PIL import Image

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Reply = str | list[Box] | list[Point]


@dataclass(frozen=True)
class Request:
    """One thing to ask: `text` is the question, the caption's length or the object."""

    task: Literal["query", "caption", "detect", "point"]
    image: Image.Image
    text: str


@dataclass(frozen=True)
class Turn:
    """One question of a conversation with the pictures it brings; `answer` is what was said to it, "" where that is asked."""

    text: str
    images: tuple[Image.Image, ...] = ()
    answer: str = ""


Conversation = tuple[Turn, ...]
