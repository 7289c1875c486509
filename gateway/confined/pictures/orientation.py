"""Owns reading the orientation out of an EXIF block, as browsers do: that one tag, whatever the others hold."""

from __future__ import annotations

import struct
from typing import Final

_ORIENTATION: Final = 0x0112
_SHORT: Final = 3


def orientation(exif: bytes) -> int:
    """1 to 8; 1 where the block is damaged or does not say. It may begin with `Exif\\0\\0`."""
    begin = 6 if exif[:4] == b"Exif" else 0
    block = exif[begin:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    try:
        (table,) = struct.unpack_from(order + "I", block, 4)
        (num_entries,) = struct.unpack_from(order + "H", block, table)
        for number in range(num_entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", block, table + 2 + 12 * number)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
