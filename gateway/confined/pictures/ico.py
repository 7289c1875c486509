"""Owns choosing the picture of an ICO or CUR file that is shown: the largest, then the one of most colours. No state."""

from __future__ import annotations

import struct

from gateway.confined.pictures import png
from gateway.confined.pictures.essence import Essence, Refused


def read(data: bytes) -> Essence:
    """A PNG inside is a PNG; a bitmap becomes an ICO of its own. Raises `Refused` for damaged directories."""
    (num_entries,) = struct.unpack_from("<H", data.ljust(6, b"\0"), 4)
    best: tuple[int, int, int] | None = None
    found = b""
    for number in range(num_entries):
        at = 6 + 16 * number
        if at + 16 > len(data):
            break
        width, height, num_colours, _, _, depth, length, offset = struct.unpack_from("<4B2H2I", data, at)
        content = data[offset : offset + length]
        if len(content) < 40 or len(content) < length:
            continue
        if data[2] == 2:  # of a cursor these are the coordinates of its tip
            depth = struct.unpack_from("<H", content, 14)[0] if content[:8] != png.SIGNATURE else 32
        size = (width or 256) * (height or 256)
        rank = (size, depth or max(num_colours - 1, 0).bit_length(), -number)
        if best is None or rank > best:
            best, found = rank, content
    if best is None:
        raise Refused(f"the ICO holds no whole picture in its {len(data)} bytes")
    if found[:8] == png.SIGNATURE:
        return png.read(found)
    width, height, _, depth = struct.unpack_from("<iiHH", found, 4)
    side = [value if value < 256 else 0 for value in (width, abs(height) // 2)]
    if not (1 <= width <= 256 and 2 <= abs(height) <= 512):
        raise Refused(f"the ICO holds a bitmap of {width}×{abs(height) // 2}; up to 256×256 are accepted")
    entry = struct.pack("<4B2H2I", *side, 0, 0, 1, depth, len(found), 22)
    return Essence("ICO", struct.pack("<3H", 0, 1, 1) + entry + found)
