"""Owns decoding one untrusted file to the RGB pixels that a browser would show. Runs in a picture process.

The size is judged by the header, before any pixel is decoded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Final, NamedTuple

from PIL import AvifImagePlugin, Image, ImageFile, UnidentifiedImageError

from gateway.confined.pictures import avif, damage, ico, jpeg, png, webp
from gateway.confined.pictures.colour import to_rgb
from gateway.confined.pictures.essence import ANIMATED, Essence, Refused
from gateway.confined.pictures.orientation import orientation
from gateway.confined.pictures.sniff import kind_of

_READERS: Final[dict[str, Callable[[bytes], Essence]]] = {
    "JPEG": jpeg.read,
    "PNG": png.read,
    "WEBP": webp.read,
    "AVIF": avif.read,
    "ICO": ico.read,
}
LARGE_PIXELS: Final = 1 << 20  # below, nothing is reduced: it would save little
Wanted = Callable[[int, int], tuple[int, int] | None]

_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def start() -> None:
    """Set up a process for it: no limits but ours, and no threads."""
    Image.MAX_IMAGE_PIXELS = None  # `decode` judges the size itself, exactly
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.preinit()
    Image.init()


class Decoded(NamedTuple):
    """Upright pixels that stand for a picture of `width × height`; they fill `box` of the image, which may be smaller."""

    image: Image.Image
    width: int
    height: int
    box: tuple[float, float, float, float]


def decode(data: bytes, *, max_pixels: int, min_side: int) -> Image.Image:
    """Upright RGB in sRGB, on white where transparent. Raises `Refused`."""
    return decode_for(data, max_pixels=max_pixels, min_side=min_side, wanted=lambda width, height: None).image


def decode_for(data: bytes, *, max_pixels: int, min_side: int, wanted: Wanted) -> Decoded:
    """The same, at half, a quarter or an eighth of the size where a large JPEG's decoder can and that is enough.

    `wanted` says what size is enough for an upright picture of a width and height, or None for all of it.
    Raises `Refused`.
    """
    kind = kind_of(data)
    if kind == "AVIF" and not AvifImagePlugin.SUPPORTED:
        raise Refused("this build of Pillow reads no AVIF; JPEG, PNG and WEBP are accepted")
    essence = _READERS[kind](data) if kind in _READERS else Essence(kind, data)
    try:
        image = damage.open_file(essence)
    except Image.DecompressionBombError:
        raise Refused(f"a picture may have at most {max_pixels} pixels", too_large=True) from None
    except MemoryError:
        raise Refused("decoding the picture takes more memory than allowed", too_large=True) from None
    except Exception as error:
        raise Refused(f"the {kind} is damaged, its header cannot be read: {_words(error)}") from None
    width, height = image.size
    if width * height > max_pixels:
        message = f"the picture is {width}×{height}; at most {max_pixels} pixels are accepted"
        raise Refused(message, too_large=True)
    if min(width, height) < min_side:
        raise Refused(f"the picture is {width}×{height}; each side must have at least {min_side} pixels")
    try:
        if getattr(image, "is_animated", False):
            raise Refused(ANIMATED)
        essence = _described(essence, image)
        is_turned = essence.orientation >= 5
        enough = wanted(height, width) if is_turned else wanted(width, height)
        if kind == "JPEG" and enough is not None and width * height >= LARGE_PIXELS:
            image.draft(image.mode, enough[::-1] if is_turned else enough)
        upright = _upright_rgb(image, essence)
        scale = 2 ** round(math.log2(max(width, height) / max(upright.size)))
        box = _box(upright, width / scale, height / scale, essence.orientation)
        return Decoded(upright, *((height, width) if is_turned else (width, height)), box)
    except Refused:
        raise
    except MemoryError:
        raise Refused("decoding the picture takes more memory than allowed", too_large=True) from None
    except Exception as error:  # a broken file can raise nearly anything from a decoder
        raise Refused(f"the {kind} is damaged and cannot be decoded: {_words(error)}") from None


def _upright_rgb(image: ImageFile.ImageFile, essence: Essence) -> Image.Image:
    uncovered = _uncovered(image)
    low = _low_bytes(essence) if essence.depth == 16 and len(essence.key) == 3 else None
    rgb = to_rgb(damage.load(image, essence), essence, low)
    for box in uncovered:
        rgb.paste("white", box)
    turn = _TURNS.get(essence.orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _box(upright: Image.Image, width: float, height: float, turned: int) -> tuple[float, float, float, float]:
    """Where the pixels are: a reduced picture's last row and column are only partly filled, before it is turned."""
    if turned >= 5:
        width, height = height, width
    left = upright.width - width if turned in (2, 3, 6, 7) else 0
    top = upright.height - height if turned in (3, 4, 7, 8) else 0
    return left, top, left + width, top + height


def _low_bytes(essence: Essence) -> Image.Image:
    """The lower half of each sample of 16 bits: Pillow reads the upper ones, or these if told the other order."""
    image = damage.open_file(essence)
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    return damage.load(image, essence)


def _uncovered(image: ImageFile.ImageFile) -> list[tuple[int, int, int, int]]:
    """The parts of a GIF's screen that its frame leaves free: browsers show what is behind."""
    extents = image.tile[0].extents if image.format == "GIF" and image.tile else None
    if extents is None:
        return []
    left, top, right, bottom = extents
    width, height = image.size
    boxes = [
        (0, 0, width, top),
        (0, bottom, width, height),
        (0, top, left, bottom),
        (right, top, width, bottom),
    ]
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


def _described(essence: Essence, image: ImageFile.ImageFile) -> Essence:
    """What only the decoder could find: an AVIF's profile, and its turn in the form of EXIF."""
    if essence.format != "AVIF":
        return essence
    turned = orientation(image.info.get("exif", b""))
    return replace(essence, orientation=turned, profile=image.info.get("icc_profile", b"") or essence.profile)


def _words(error: Exception) -> str:
    """What a decoder says, without addresses of objects."""
    if isinstance(error, UnidentifiedImageError):
        return "it is cut off or not of a kind that the decoder knows"
    words = re.sub(r"<[^>]*>", "", str(error))[:200].strip()
    return f"{words} ({type(error).__name__})" if words else type(error).__name__
