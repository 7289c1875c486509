"""Owns reading a JPEG's segments up to its first scan: what the decoder needs, orientation and colour profile.

The picture is the first of the file: previews and gain maps behind it (MPF) do not count. No state.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.confined.pictures.essence import Essence, Refused
from gateway.confined.pictures.orientation import orientation

_START_OF_SCAN: Final = 0xDA
_END: Final = 0xD9
_FRAMES: Final = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_MARKER: Final = re.compile(rb"\xff[^\xff\x00\x01\xd0-\xd8]")  # those that have a segment, and the end
_TABLES: Final = (0xC4, 0xCC, 0xDB, 0xDD)  # and the restart interval
_READ: Final = "baseline and progressive JPEGs of 8 bits with Huffman coding are accepted"
_OTHER_FRAMES: Final = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "hierarchical",
    0xC9: "arithmetically coded",
    0xCA: "arithmetically coded",
    0xCB: "lossless and arithmetically coded",
    0xCD: "hierarchical",
    0xCE: "hierarchical",
    0xCF: "hierarchical",
}


def read(data: bytes) -> Essence:
    """Raises `Refused` for kinds of JPEG that browsers do not show, and for a file that ends in its header."""
    kept = [b"\xff\xd8"]
    exif = b""
    profile_parts: dict[int, bytes] = {}
    num_profile_parts = 0
    frame = 0
    at = 2
    while True:
        found = _MARKER.search(data, at)
        if found is None or found.start() + 4 > len(data):
            raise Refused(f"the JPEG is damaged: it is cut off in its header, after {len(data)} bytes")
        at = found.start()
        marker = data[at + 1]
        if marker == _END:
            raise Refused("the JPEG is damaged: it ends before its pixels begin")
        if marker == _START_OF_SCAN:
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end > len(data):
            raise Refused(f"the JPEG is damaged: it is cut off in its header, after {len(data)} bytes")
        segment = data[at + 4 : end]
        if marker == 0xE1 and segment[:6] == b"Exif\0\0" and not exif:
            exif = segment[6:]
        elif marker == 0xE2 and segment[:12] == b"ICC_PROFILE\0" and len(segment) > 14:
            profile_parts[segment[12]] = segment[14:]
            num_profile_parts = segment[13]
        elif marker in _OTHER_FRAMES:
            raise Refused(f"the JPEG is {_OTHER_FRAMES[marker]}; {_READ}")
        elif marker in _FRAMES:
            _check_frame(segment)
            frame = marker
            kept.append(data[at:end])
        elif marker in _TABLES or _decides_colours(marker, segment):
            kept.append(data[at:end])
        at = max(end, at + 4)
    if not frame:
        raise Refused("the JPEG is damaged: its pixels come before its size")
    numbers = range(1, num_profile_parts + 1)
    whole = bool(profile_parts) and all(number in profile_parts for number in numbers)
    header = b"".join(kept)
    return Essence(
        "JPEG",
        header + data[at:],
        orientation=orientation(exif),
        profile=b"".join(profile_parts[number] for number in numbers) if whole else b"",
        progressive=frame == 0xC2,
        pixels_at=len(header),
    )


def _decides_colours(marker: int, segment: bytes) -> bool:
    """JFIF and Adobe segments say what the channels are."""
    if marker == 0xE0:
        return segment[:5] == b"JFIF\0" and len(segment) >= 14
    return marker == 0xEE and segment[:5] == b"Adobe" and len(segment) >= 12


def _check_frame(segment: bytes) -> None:
    if len(segment) < 6:
        raise Refused("the JPEG is damaged: its frame has no size")
    if segment[0] != 8:
        raise Refused(f"the JPEG has {segment[0]} bits a sample; {_READ}")
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    if not (height and width):
        raise Refused(f"the JPEG is damaged: its header says {width}×{height} pixels")
    if segment[5] not in (1, 3, 4):
        raise Refused(f"the JPEG has {segment[5]} channels; 1, 3 and 4 are accepted")
