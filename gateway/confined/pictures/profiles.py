"""Owns writing ICC profiles for colour spaces that a file names by numbers instead of holding a profile.

The profiles are small ones of version 2: three corners and one curve. No state.
"""

from __future__ import annotations

import struct
from typing import Final

from gateway.confined.pictures.essence import Refused

Corners = tuple[float, ...]  # x and y of white, red, green and blue, eight numbers in all
Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
Vector = tuple[float, float, float]

SRGB: Final[Corners] = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_CODED_CORNERS: Final[dict[int, Corners]] = {  # by the numbers of ITU-T H.273
    1: SRGB,
    2: SRGB,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_SRGB_CURVE: Final = 0.0  # stands for the curve of sRGB among powers
# Video's curves are shown as sRGB's by browsers.
_CODED_CURVES: Final = {
    1: _SRGB_CURVE,
    2: _SRGB_CURVE,
    4: 2.2,
    5: 2.8,
    6: _SRGB_CURVE,
    7: _SRGB_CURVE,
    8: 1.0,
}
_CODED_CURVES.update({13: _SRGB_CURVE, 14: _SRGB_CURVE, 15: _SRGB_CURVE})
_HIGH_RANGE: Final = {16: "PQ", 18: "HLG"}
_D50: Final[Vector] = (0.9642, 1.0, 0.8249)
_BRADFORD: Final[Matrix] = (
    (0.8951, 0.2664, -0.1614),
    (-0.7502, 1.7135, 0.0367),
    (0.0389, -0.0685, 1.0296),
)


def to_srgb(linear: float) -> float:
    """sRGB's curve, 0 to 1 from light to code."""
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def from_srgb(code: float) -> float:
    """sRGB's curve, 0 to 1 from code to light."""
    return code / 12.92 if code <= 0.04045 else ((code + 0.055) / 1.055) ** 2.4


def coded_profile(corners: int, curve: int) -> bytes:
    """The profile of a space named by the numbers of H.273; empty for sRGB and what has no number.

    Raises `Refused` for pictures of high dynamic range: shown as they are, they would be pale.
    """
    if name := _HIGH_RANGE.get(curve):
        raise Refused(
            f"the picture is of high dynamic range ({name}); pictures of standard range are accepted"
        )
    chosen, power = _CODED_CORNERS.get(corners, SRGB), _CODED_CURVES.get(curve, _SRGB_CURVE)
    if chosen == SRGB and power == _SRGB_CURVE:
        return b""
    return _write(chosen, power)


def gamma_profile(gamma: float, corners: Corners) -> bytes:
    """The profile of a PNG's gAMA and cHRM (or none); empty where they say sRGB, or nothing that can be."""
    if not 0.01 <= gamma <= 10:
        return b""
    is_plain = not corners or all(abs(a - b) < 0.005 for a, b in zip(corners, SRGB, strict=True))
    if is_plain and abs(gamma * 2.2 - 1) <= 0.05:  # how files say sRGB that have no chunk for it
        return b""
    try:
        return _write(SRGB if is_plain else corners, 1 / gamma)
    except (ZeroDivisionError, struct.error, OverflowError):
        return b""


def _write(corners: Corners, power: float) -> bytes:
    if power == _SRGB_CURVE:
        table = [round(65535 * from_srgb(number / 1023)) for number in range(1024)]
        curve = struct.pack(">4s4xI1024H", b"curv", 1024, *table)
    else:
        curve = struct.pack(">4s4xIH2x", b"curv", 1, min(65535, round(power * 256)))
    colorants = _colorants(corners)
    text = b"Degas\0"
    tags = [
        (b"desc", struct.pack(">4s4xI", b"desc", len(text)) + text + bytes(79)),
        (b"cprt", b"text" + bytes(4) + text),
        (b"wtpt", _xyz(_D50)),
        *(
            (tag, _xyz(colorant))
            for tag, colorant in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)
        ),
        *((tag, curve) for tag in (b"rTRC", b"gTRC", b"bTRC")),
    ]
    table_bytes = 4 + 12 * len(tags)
    entries, contents = b"", b""
    for tag, content in tags:
        entries += struct.pack(">4sII", tag, 128 + table_bytes + len(contents), len(content))
        contents += content + bytes(-len(content) % 4)
    size = 128 + table_bytes + len(contents)
    head = struct.pack(">I4xI4s4s4s12x4s", size, 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = head.ljust(68, b"\0") + _xyz(_D50)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + contents


def _xyz(value: Vector) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *(round(number * 65536) for number in value))


def _colorants(corners: Corners) -> tuple[Vector, Vector, Vector]:
    """Red, green and blue as XYZ under D50. Raises ZeroDivisionError for corners that span nothing."""
    white, *primaries = (
        (x / y, 1.0, (1 - x - y) / y) for x, y in zip(corners[::2], corners[1::2], strict=True)
    )
    red, green, blue = primaries
    unscaled = _columns(red, green, blue)
    scale = _times(_inverse(unscaled), white)
    lights = _times(_BRADFORD, white)
    wanted = _times(_BRADFORD, _D50)
    back = _inverse(_BRADFORD)

    def adapt(primary: Vector, factor: float) -> Vector:
        a, b, c = _times(_BRADFORD, primary)
        adapted = (
            a * factor * wanted[0] / lights[0],
            b * factor * wanted[1] / lights[1],
            c * factor * wanted[2] / lights[2],
        )
        return _times(back, adapted)

    return adapt(red, scale[0]), adapt(green, scale[1]), adapt(blue, scale[2])


def _columns(a: Vector, b: Vector, c: Vector) -> Matrix:
    return (a[0], b[0], c[0]), (a[1], b[1], c[1]), (a[2], b[2], c[2])


def _times(matrix: Matrix, vector: Vector) -> Vector:
    x, y, z = (sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)
    return x, y, z


def _inverse(m: Matrix) -> Matrix:
    (a, b, c), (d, e, f), (g, h, i) = m
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    if abs(determinant) < 1e-9:
        raise ZeroDivisionError("corners in one line")
    return (
        ((e * i - f * h) / determinant, (c * h - b * i) / determinant, (b * f - c * e) / determinant),
        ((f * g - d * i) / determinant, (a * i - c * g) / determinant, (c * d - a * f) / determinant),
        ((d * h - e * g) / determinant, (b * g - a * h) / determinant, (a * e - b * d) / determinant),
    )
