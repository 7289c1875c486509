"""Owns what must be known of an AVIF before it is decoded: where its colours stand and that no EXIF is in the way.

AVIF says in boxes of its own how a picture is turned; orientation in EXIF does not count. No state.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final

from gateway.confined.pictures.essence import Essence
from gateway.confined.pictures.profiles import coded_profile

_INSIDE: Final = {b"meta": 4, b"iprp": 0, b"ipco": 0}  # boxes that hold boxes, and what comes before these
_EXIF_ITEM: Final = re.compile(
    rb"(infe(?:\x02.{5}|\x03.{7})..)Exif", re.DOTALL
)  # versions 2 and 3 of the box
_MAX_BOXES: Final = 4096


def read(data: bytes) -> Essence:
    """Raises `Refused` for pictures of high dynamic range."""
    profile = b""
    has_icc = False
    hidden: list[tuple[int, int]] = []
    for kind, begin, end in _boxes(data, 0, len(data), [_MAX_BOXES]):
        if kind == b"iinf":
            hidden.append((begin, end))
        elif kind == b"colr":
            content = data[begin:end]
            if content[:4] in (b"prof", b"rICC"):
                has_icc = True
            elif content[:4] == b"nclx" and len(content) >= 8:
                profile = profile or coded_profile(*struct.unpack_from(">HH", content, 4))
    essence = bytearray(data)
    for begin, end in hidden:  # an item of a kind that the decoder passes over: damaged EXIF stops it
        essence[begin:end] = _EXIF_ITEM.sub(rb"\1free", data[begin:end])
    return Essence("AVIF", bytes(essence), profile=b"" if has_icc else profile)


def _boxes(data: bytes, at: int, end: int, left: list[int]) -> Iterator[tuple[bytes, int, int]]:
    """Kind, beginning and end of the content of each box, those inside others as well; `left` bounds them."""
    while at + 8 <= end and left[0] > 0:
        left[0] -= 1
        size, kind = struct.unpack_from(">I4s", data, at)
        begin = at + 8
        if size == 1 and at + 16 <= end:
            (size,) = struct.unpack_from(">Q", data, begin)
            begin += 8
        stop = end if size == 0 else at + size
        if stop <= at or stop > end or begin > stop:
            return
        yield kind, begin, stop
        if kind in _INSIDE:
            yield from _boxes(data, begin + _INSIDE[kind], stop, left)
        at = stop
