"""Owns reading a PNG's chunks: the pixels' own ones for the decoder, and colour space, orientation, transparency.

Text is never unpacked, and damage to chunks that pixels do not need is passed over, as in browsers. No state.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

from gateway.confined.pictures.essence import ANIMATED, Essence, Refused
from gateway.confined.pictures.orientation import orientation
from gateway.confined.pictures.profiles import coded_profile, gamma_profile

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # of colour types
_PALETTE: Final = 3
_MAX_PROFILE_BYTES: Final = 4 << 20
_METADATA: Final = (b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"eXIf", b"acTL")


@dataclass(slots=True)
class _Chunks:
    header: bytes = b""
    palette: bytes = b""
    pixels: list[bytes] = field(default_factory=list)  # IDAT chunks, whole but for the last of a cut file
    frame: list[bytes] = field(default_factory=list)  # what the fdAT chunks hold
    frame_controls: list[tuple[bool, bytes]] = field(default_factory=list)  # came before IDAT?, its content
    metadata: dict[bytes, bytes] = field(default_factory=dict)
    is_cut: bool = False


def read(data: bytes) -> Essence:
    """Raises `Refused` for animations, and for headers that are damaged, impossible or cut off."""
    chunks = _read_chunks(data)
    if len(chunks.header) != 13:
        raise Refused(f"the PNG is damaged: it is cut off in its header, after {len(data)} bytes")
    width, height, depth, colour_type = struct.unpack_from(">IIBB", chunks.header)
    if not (width and height):
        raise Refused(f"the PNG is damaged: its header says {width}×{height} pixels")
    if depth not in _DEPTHS.get(colour_type, ()):
        raise Refused(f"the PNG is damaged: no PNG has colour type {colour_type} with {depth} bits")
    pixels = _still(chunks)
    if not pixels:
        raise Refused(f"the PNG is damaged: it holds no pixels{_cut(data) if chunks.is_cut else ''}")
    if colour_type == _PALETTE and not chunks.palette:
        raise Refused("the PNG is damaged: it has no palette, and its pixels are numbers of palette entries")
    found = chunks.metadata
    parts = [SIGNATURE, _chunk(b"IHDR", chunks.header)]
    if chunks.palette:
        parts.append(_chunk(b"PLTE", chunks.palette))
    transparency = found.get(b"tRNS", b"")
    key: tuple[int, ...] = ()
    if colour_type == _PALETTE and transparency:
        parts.append(_chunk(b"tRNS", transparency[:256]))
    elif len(transparency) == {0: 2, 2: 6}.get(colour_type):
        key = struct.unpack(f">{len(transparency) // 2}H", transparency)
    end = b"" if chunks.is_cut else _chunk(b"IEND", b"")
    gamma, profile = _colour_space(found)
    return Essence(
        "PNG",
        b"".join([*parts, *pixels, end]),
        orientation=orientation(found.get(b"eXIf", b"")),
        profile=profile,
        gamma=gamma,
        key=key,
        depth=depth,
    )


def _read_chunks(data: bytes) -> _Chunks:
    chunks = _Chunks()
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        begin, end = at + 8, at + 8 + length
        content = data[begin:end]
        if kind == b"IDAT":
            chunks.pixels.append(data[at : end + 4])
        if end + 4 > len(data):
            chunks.is_cut = True
            break
        checksum = int.from_bytes(data[end : end + 4], "big")
        is_sound = kind == b"IDAT" or zlib.crc32(content, zlib.crc32(kind)) == checksum
        if kind in (b"IHDR", b"PLTE"):
            if not is_sound:
                raise Refused(f"the PNG is damaged: the checksum of its {kind.decode()} chunk is wrong")
            if kind == b"IHDR":
                chunks.header = chunks.header or content
            else:
                chunks.palette = chunks.palette or content
        elif kind == b"IEND":
            break
        elif kind == b"CgBI":
            raise Refused("the PNG is in Apple's own form for apps (CgBI); ordinary PNGs are accepted")
        elif kind == b"fcTL":
            chunks.frame_controls.append((not chunks.pixels, content))
        elif kind == b"fdAT":
            chunks.frame.append(content[4:])
        elif kind in _METADATA and is_sound:
            chunks.metadata.setdefault(kind, content)
        at = end + 4
    else:
        chunks.is_cut = True
    return chunks


def _still(chunks: _Chunks) -> list[bytes]:
    """The chunks of the one picture that is shown. Raises `Refused` where there are several."""
    control = chunks.metadata.get(b"acTL", b"")
    num_frames = int.from_bytes(control[:4], "big")
    if len(control) != 8 or not chunks.frame_controls or num_frames == 0:
        return chunks.pixels
    if num_frames > 1:
        raise Refused(ANIMATED)
    before_pixels, first = chunks.frame_controls[0]
    if before_pixels or not chunks.frame:
        return chunks.pixels
    # The pixels are for programs without animations; its one frame, which covers the picture, is what is shown.
    if first[4:20] != chunks.header[:8] + bytes(8):
        raise Refused("the PNG is damaged: the first frame of its animation does not cover the picture")
    return [_chunk(b"IDAT", b"".join(chunks.frame))]


def _colour_space(found: dict[bytes, bytes]) -> tuple[float, bytes]:
    """Gamma and profile by the chunk that counts: cICP before iCCP before sRGB before gAMA with cHRM."""
    if len(coded := found.get(b"cICP", b"")) == 4:
        return 0.0, coded_profile(coded[0], coded[1])
    if b"iCCP" in found and (profile := _profile(found[b"iCCP"])):
        return 0.0, profile
    if b"sRGB" in found or len(found.get(b"gAMA", b"")) != 4:
        return 0.0, b""
    gamma = int.from_bytes(found[b"gAMA"], "big") / 100_000
    corners = found.get(b"cHRM", b"")
    xy = tuple(value / 100_000 for value in struct.unpack(">8I", corners)) if len(corners) == 32 else ()
    profile = gamma_profile(gamma, xy)
    return (gamma if profile else 0.0), profile


def _profile(content: bytes) -> bytes:
    """What an iCCP chunk holds; nothing where it is damaged or absurdly large."""
    _, found, packed = content.partition(b"\0")
    if not found or packed[:1] != b"\0":
        return b""
    unpack = zlib.decompressobj()
    try:
        profile = unpack.decompress(packed[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    return profile if unpack.eof else b""


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
    )


def _cut(data: bytes) -> str:
    return f", cut off after {len(data)} bytes"
