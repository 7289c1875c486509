"""Owns reading a WebP's chunks: those of the pixels for the decoder, orientation and colour profile. No state."""

from __future__ import annotations

import struct
from typing import Final

from gateway.confined.pictures.essence import ANIMATED, Essence, Refused
from gateway.confined.pictures.orientation import orientation

_PIXELS: Final = (b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF")
_KEPT_FLAGS: Final = 0x12  # alpha and animation; not those of the chunks that are left out


def read(data: bytes) -> Essence:
    """Raises `Refused` for animations and for files cut off within their pixels."""
    kept: list[bytes] = []
    profile = exif = b""
    num_frames = 0
    has_pixels = False
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        content = data[at + 8 : at + 8 + length]
        if len(content) < length:
            if kind in _PIXELS:
                message = f"it is cut off, {len(content)} of {length} bytes of its pixels are here"
                raise Refused(f"the WEBP is damaged: {message}")
            break
        if kind == b"VP8X":
            content = bytes([content[0] & _KEPT_FLAGS]) + content[1:] if content else content
        if kind == b"VP8X" or kind in _PIXELS:
            kept.append(kind + struct.pack("<I", length) + content + bytes(length % 2))
            has_pixels |= kind in (b"VP8 ", b"VP8L", b"ANMF")
        num_frames += kind == b"ANMF"
        if kind == b"ICCP":
            profile = profile or content
        elif kind == b"EXIF":
            exif = exif or content
        at += 8 + length + length % 2
    if num_frames > 1:
        raise Refused(ANIMATED)
    if not has_pixels:
        raise Refused(f"the WEBP is damaged: it holds no pixels in its {len(data)} bytes")
    body = b"WEBP" + b"".join(kept)
    essence = b"RIFF" + struct.pack("<I", len(body)) + body
    return Essence("WEBP", essence, orientation=orientation(exif), profile=profile)
