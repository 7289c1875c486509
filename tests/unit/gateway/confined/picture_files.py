"""Owns writing picture files by hand for tests: PNGs of every kind, EXIF blocks, profiles, segments."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Samples = npt.NDArray[np.uint16]  # [height, width, channels]
Pixels = npt.NDArray[np.uint8]  # [height, width, 3]

ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    samples: Samples,
    depth: int,
    colour_type: int,
    *before: bytes,
    interlaced: bool = False,
    after: bytes = b"",
) -> bytes:
    """A PNG of these samples; `before` are chunks that come before the pixels, `after` one that follows them."""
    height, width = samples.shape[:2]
    parts = [samples]
    if interlaced:
        parts = [samples[top::down, left::across] for top, left, down, across in ADAM7]
    raw = b"".join(_rows(part, depth) for part in parts)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    packed = zlib.compress(raw)
    middle = len(packed) // 2
    pixels = chunk(b"IDAT", packed[:middle]) + chunk(b"IDAT", packed[middle:])
    return head + b"".join(before) + pixels + after + chunk(b"IEND", b"")


def _rows(samples: Samples, depth: int) -> bytes:
    if samples.size == 0:
        return b""
    rows = samples.reshape(samples.shape[0], -1)
    if depth == 16:
        data = rows.astype(">u2").tobytes()
        stride = rows.shape[1] * 2
    elif depth == 8:
        data, stride = rows.astype(np.uint8).tobytes(), rows.shape[1]
    else:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        packed = np.packbits(bits.reshape(rows.shape[0], -1).astype(np.uint8), axis=1)
        data, stride = packed.tobytes(), packed.shape[1]
    return b"".join(b"\0" + data[at : at + stride] for at in range(0, len(data), stride))


def exif(orientation: int, *, order: str = "<", rational: tuple[int, int] | None = None) -> bytes:
    """A TIFF block with an orientation, and before it an XResolution if one is given."""
    entries = [struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)]
    if rational is not None:
        entries.append(struct.pack(order + "HHII", 0x011A, 5, 1, 8 + 2 + 24 + 4))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    table = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    return head + table + (struct.pack(order + "ii", *rational) if rational else b"")


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with these segments right behind its beginning."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def encoded(image: Image.Image, kind: str = "PNG", **fields: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **fields)
    return file.getvalue()


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """What EXIF's orientation asks for, by its definition: where the stored row 0 and column 0 are to be shown."""
    shown = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    flip_down = orientation in (3, 4, 7, 8)
    flip_across = orientation in (2, 3, 6, 7)
    return shown[:: -1 if flip_down else 1, :: -1 if flip_across else 1]


def scene(width: int = 48, height: int = 32) -> Pixels:
    """Blocks of 16 pixels in colours that differ, so that any turn, swap and lossy coding can be told apart."""
    colours = itertools.cycle(
        [
            (220, 30, 40),
            (20, 160, 60),
            (40, 60, 200),
            (240, 240, 240),
            (10, 10, 10),
            (230, 200, 40),
            (120, 120, 120),
        ]
    )
    pixels = np.zeros((height, width, 3), np.uint8)
    for top in range(0, height, 16):
        for left in range(0, width, 16):
            pixels[top : top + 16, left : left + 16] = next(colours)
    return pixels


def gradient(width: int, height: int, channels: int, depth: int, seed: int) -> Samples:
    """Samples over the whole range of the depth, with its ends in it."""
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, 1 << depth, (height, width, channels)).astype(np.uint16)
    samples[0, 0], samples[-1, -1] = 0, (1 << depth) - 1
    return samples


# ---------------------------------------------------------------- colours, by their definitions

_XYZ_OF_SRGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_XYZ_OF_P3 = np.array(
    [[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869], [0.0, 0.0451134, 1.0439444]]
)
_XYZ_OF_ADOBE = np.array(
    [[0.5767309, 0.1855540, 0.1881852], [0.2973769, 0.6273491, 0.0752741], [0.0270343, 0.0706872, 0.9911085]]
)


def srgb_code(linear: npt.NDArray[np.float64]) -> Pixels:
    clipped = np.clip(linear, 0, 1)
    code = np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)
    pixels: Pixels = np.rint(255 * code).astype(np.uint8)
    return pixels


def srgb_light(code: Pixels) -> npt.NDArray[np.float64]:
    value = code / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def from_p3(code: Pixels) -> Pixels:
    return srgb_code(srgb_light(code) @ (np.linalg.inv(_XYZ_OF_SRGB) @ _XYZ_OF_P3).T)


def from_adobe(code: Pixels) -> Pixels:
    light = (code / 255) ** 2.19921875
    return srgb_code(light @ (np.linalg.inv(_XYZ_OF_SRGB) @ _XYZ_OF_ADOBE).T)


def _profile(space: bytes, pcs: bytes, tags: list[tuple[bytes, bytes]], kind: bytes) -> bytes:
    entries, contents, begin = b"", b"", 132 + 12 * len(tags)
    for tag, content in tags:
        entries += struct.pack(">4sII", tag, begin + len(contents), len(content))
        contents += content + bytes(-len(content) % 4)
    size = begin + len(contents)
    head = struct.pack(">I4xI4s4s4s12x4s", size, 0x02100000, kind, space, pcs, b"acsp").ljust(68, b"\0")
    head += struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + contents


_WHITE = (b"wtpt", struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in (0.9642, 1, 0.8249))))


def grey_profile(power: float) -> bytes:
    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(power * 256))
    return _profile(b"GRAY", b"XYZ ", [_WHITE, (b"kTRC", curve)], b"mntr")


def ink_profile() -> bytes:
    """A CMYK profile in which cyan ink is yellow and black ink is nothing: no guess comes to the same."""
    ramp = bytes(range(256))
    table = b""
    for cyan, magenta, yellow, _black in itertools.product((0, 1), repeat=4):
        lightness = 255 - 60 * cyan - 60 * magenta - 60 * yellow
        table += bytes([lightness, 128, 128 + 60 * cyan])
    lut = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + struct.pack(
        ">9i", *(65536 * int(n % 4 == 0) for n in range(9))
    )
    lut += ramp * 4 + table + ramp * 3
    return _profile(b"CMYK", b"Lab ", [_WHITE, (b"A2B0", lut)], b"prtr")
