"""Owns telling what a file is by its first bytes, as browsers do: what was declared does not count. No state."""

from __future__ import annotations

import re
from typing import Final

from gateway.confined.pictures.essence import NoPicture

ACCEPTED: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "ICO")

_PICTURES: Final = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"BM"), "BMP"),
    (re.compile(rb"\0\0[\1\2]\0"), "ICO"),
)
_OTHERS: Final = (
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "a TIFF file"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 file"),
    (re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"), "a JPEG XL file"),
    (re.compile(rb"\xff\xd8"), "a JPEG that ends after two bytes"),
    (re.compile(rb"8BPS"), "a Photoshop file"),
    (re.compile(rb"%PDF-|%!PS"), "a document, not a picture"),
    (re.compile(rb"P[1-7][\s#]"), "a PPM file"),
    (re.compile(rb"v/1\x01"), "an OpenEXR file"),
    (re.compile(rb"#\?RADIANCE"), "a Radiance HDR file"),
    (re.compile(rb"\x1f\x8b|PK\x03\x04|\x28\xb5\x2f\xfd|7z\xbc\xaf"), "an archive"),
    (re.compile(rb"\x1aE\xdf\xa3|RIFF.{4}AVI ", re.DOTALL), "a video"),
    (
        re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<[?!][^<]*)*<svg[\s>]", re.IGNORECASE),
        "an SVG drawing, which Degas does not draw",
    ),
    (
        re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|\?xml|head|body)", re.IGNORECASE),
        "a web page or XML",
    ),
    (
        re.compile(rb"data:|iVBORw0KGgo|/9j/|R0lGOD|UklGR"),
        "base64 once more: encode the file only once. It is text",
    ),
)


def kind_of(data: bytes) -> str:
    """One of `ACCEPTED`. Raises `NoPicture` with the name of what it is instead, as far as that can be told."""
    if not data:
        raise NoPicture("the data is no picture: it is empty")
    head = data[:1024]
    for pattern, kind in _PICTURES:
        if pattern.match(head):
            return kind
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    unknown = f"{len(data)} bytes that begin with {data[:8].hex(' ')}"
    raise NoPicture(_no_picture(next((name for pattern, name in _OTHERS if pattern.match(head)), unknown)))


def _of_brands(head: bytes) -> str:
    """Files of ISO boxes name what they are in their first box."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
        raise NoPicture(_no_picture("a HEIC file"))
    raise NoPicture(_no_picture("a video"))


def _no_picture(found: str) -> str:
    return f"the data is no picture in one of the formats {', '.join(ACCEPTED)}: it is {found}"
