"""Owns what a picture's file comes down to: the bytes its pixels depend on, and what says how to show them.

Readers of containers make it (`jpeg`, `png`, …), so that no decoder stumbles over metadata. No state.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class Refused(Exception):
    """A picture that is not decoded; the message is for its sender."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


class NoPicture(Refused):
    """The file is of no kind that is read."""


@dataclass(frozen=True, slots=True)
class Essence:
    """`data` is a file for Pillow's decoder of `format`, with nothing in it that pixels do not need."""

    format: str
    data: bytes
    orientation: int = 1  # as in EXIF, 1 to 8
    profile: bytes = b""  # ICC
    gamma: float = 0.0  # of a PNG without a profile; the profile says the same
    key: tuple[int, ...] = field(default=())  # one sample a channel, in the file's own depth: transparent
    depth: int = 8  # bits of a sample of `key`
    progressive: bool = False
    pixels_at: int = 0  # where in `data` a JPEG's first scan begins


ANIMATED = "animated pictures are not accepted; send a single frame"
