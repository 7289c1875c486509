"""Owns files that lack their end: how much of a picture is missing, and what is there when that is little.

Runs in a picture process. What was never decoded is found by decoding twice, over two different fills.
"""

from __future__ import annotations

import io
import re
from typing import Final

from PIL import Image, ImageChops, ImageFile

from gateway.confined.pictures.essence import Essence, Refused

MAX_MISSING: Final = 1 / 16  # of the pixels
_END: Final = b"\xff\xd9"
_NOISE: Final = bytes((37 * number + 11) % 251 for number in range(512)) + _END
_START_OF_SCAN: Final = re.compile(rb"\xff\xda")
_SEGMENT: Final = re.compile(rb"\xff[\xc4\xcc\xda-\xdd\xe0-\xef\xfe]")  # between scans


def open_file(essence: Essence, data: bytes | None = None) -> ImageFile.ImageFile:
    """Read the header only. Raises what Pillow raises."""
    source = io.BytesIO(essence.data if data is None else data)
    image = Image.open(source, formats=(essence.format,))
    assert isinstance(image, ImageFile.ImageFile)
    return image


def load(image: ImageFile.ImageFile, essence: Essence) -> Image.Image:
    """Decode. Raises `Refused` where too much is missing, and whatever Pillow raises for other damage."""
    try:
        image.load()
    except OSError as error:
        if "truncated" not in str(error):
            raise
        if essence.format == "JPEG":
            return _cut_jpeg(essence)
        return _cut_rows(essence)
    if essence.format == "JPEG" and _is_blank_at_end(image):
        _check_end(essence)
    return image


def _decode(essence: Essence, data: bytes) -> Image.Image:
    image = open_file(essence, data)
    image.load()
    return image


def _cut_jpeg(essence: Essence) -> Image.Image:
    """A JPEG whose data ends before its end mark: the decoder makes up the rest once the mark is added."""
    data = _without_cut_segment(essence.data, essence.pixels_at).rstrip(b"\xff")
    scans = [match.start() for match in _START_OF_SCAN.finditer(data, essence.pixels_at)]
    image = _decode(essence, data + _END)
    # What follows the last pixel changes nothing; where pixels are missing, it would be taken for them.
    is_whole = image.tobytes() == _decode(essence, data + _NOISE).tobytes()
    if essence.progressive or len(scans) > 1:
        if not _is_fine(data, scans if is_whole else scans[:-1], len(image.getbands())):
            raise Refused("the JPEG is damaged: it is cut off, and only a coarse form of the picture is here")
    elif not is_whole and (missing := _blank_share(image)) > MAX_MISSING:
        raise Refused(_too_much("JPEG", missing))
    return image


def _without_cut_segment(data: bytes, pixels_at: int) -> bytes:
    """Without the tables or the header of a scan whose end is missing."""
    last = max((match.start() for match in _SEGMENT.finditer(data, pixels_at)), default=len(data))
    length = int.from_bytes(data[last + 2 : last + 4], "big")
    return data[:last] if last + 2 + max(length, 2) > len(data) else data


def _is_fine(data: bytes, scans: list[int], num_channels: int) -> bool:
    """Whether these scans give every coefficient of every channel, but for the last bits of one channel."""
    lacking: dict[tuple[int, int], int] = {}  # bits, by channel and coefficient
    for at in scans:
        spectrum = at + 5 + 2 * data[at + 4]
        first, last, bits = data[spectrum : spectrum + 3]
        for channel in data[at + 5 : spectrum : 2]:
            lacking.update(((channel, number), bits & 15) for number in range(first, last + 1))
    coarse = {channel for (channel, _), bits in lacking.items() if bits}
    return len(lacking) == 64 * num_channels and max(lacking.values()) <= 1 and len(coarse) <= 1


def _check_end(essence: Essence) -> None:
    """A JPEG that ends in grey may have been cut before somebody closed it. Raises `Refused` where it was."""
    image = _decode(essence, essence.data)
    missing = _blank_share(image)
    end = essence.data.rfind(_END)
    if essence.progressive or missing <= MAX_MISSING or end < 0:
        return
    try:
        other = _decode(essence, essence.data[:end] + _NOISE)
    except OSError:
        return
    if image.tobytes() != other.tobytes():
        raise Refused(_too_much("JPEG", missing))


def _blank_levels(image: Image.Image) -> tuple[int, ...]:
    """What the decoder puts into every channel where there was no data: its middle. Inks are inverted, some twice."""
    return (127, 128) if image.mode == "CMYK" else (128,)


def _is_blank_at_end(image: Image.Image) -> bool:
    pixel = image.getpixel((image.width - 1, image.height - 1))
    levels = _blank_levels(image)
    return all(value in levels for value in (pixel if isinstance(pixel, tuple) else (pixel,)))


def _blank_share(image: Image.Image) -> float:
    """The share of pixels that are blank, at the end and in the last rows of blocks that hold others."""
    differs: Image.Image | None = None
    is_other = [255 * (value not in _blank_levels(image)) for value in range(256)]
    for channel in image.split():
        own = channel.point(is_other)
        differs = own if differs is None else ImageChops.lighter(differs, own)
    assert differs is not None
    box = differs.getbbox()
    bottom = 0 if box is None else box[3]
    # Rows of blocks are 8 or 16 pixels high, and colours run over a block's edge by a pixel.
    num_blank = differs.crop((0, max(0, bottom - 18), image.width, image.height)).histogram()[0]
    num_mixed = 2 * image.width if num_blank else 0
    return (num_blank + num_mixed) / (image.width * image.height)


def _cut_rows(essence: Essence) -> Image.Image:
    """A file of rows: what two fills leave different was never decoded, and becomes white."""
    if essence.format not in ("PNG", "GIF", "BMP"):
        raise Refused(f"the {essence.format} is damaged: it is cut off")
    image, other = (_decode_over(essence, fill) for fill in (0, 255))
    rows = _differing_rows(image, other)
    if rows is None:
        return image
    share = (rows[1] - rows[0]) / image.height
    if share > MAX_MISSING:
        raise Refused(_too_much(essence.format, share))
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    white = 65535 if image.mode.startswith("I") else 255
    num_channels = len(image.getbands())
    image.paste(white if num_channels == 1 else (white,) * num_channels, (0, rows[0], image.width, rows[1]))
    return image


def _differing_rows(image: Image.Image, other: Image.Image) -> tuple[int, int] | None:
    """The first row in which they differ, and the one behind the last."""
    data, other_data = image.tobytes(), other.tobytes()
    stride = len(data) // image.height
    rows = range(0, len(data), stride)
    differing = [
        number for number, at in enumerate(rows) if data[at : at + stride] != other_data[at : at + stride]
    ]
    return (differing[0], differing[-1] + 1) if differing else None


def _decode_over(essence: Essence, fill: int) -> Image.Image:
    image = open_file(essence)
    prepare = image.load_prepare

    def load_prepare() -> None:
        prepare()
        num_channels = len(image.getbands())
        colour = fill if num_channels == 1 else (fill,) * num_channels
        for tile in image.tile:
            if tile.extents is not None:
                image.im.paste(colour, tile.extents)

    image.load_prepare = load_prepare  # type: ignore[method-assign]
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    return image


def _too_much(name: str, share: float) -> str:
    return (
        f"the {name} is damaged: it is cut off, {share:.0%} of its pixels are missing, "
        f"and at most {MAX_MISSING:.0%} may be"
    )
