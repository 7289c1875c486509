"""Owns turning decoded pixels of any kind to RGB as browsers show them: profiles, transparency on white.

Runs in a picture process. Transforms of the last few profiles are remembered.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Final

from PIL import Image, ImageChops, ImageCms

from gateway.confined.pictures.essence import Essence
from gateway.confined.pictures.profiles import to_srgb

_MAX_PROFILE_BYTES: Final = 4 << 20
_MODES: Final = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_PROBE_STEPS: Final = 9
_NO_DIFFERENCE: Final = 2  # levels of 255: such a profile is sRGB written down by another program
_TO_8_BITS: Final = [(value + 128) // 257 for value in range(65536)]


def to_rgb(image: Image.Image, essence: Essence, low: Image.Image | None = None) -> Image.Image:
    """The picture in sRGB, not yet upright; what is transparent is white.

    `low` holds the lower 8 bits of an RGB picture of 16 bits, where its transparent colour has as many.
    """
    colours, alpha = _split(image, essence, low)
    if essence.profile and not (image.mode.startswith("I") and essence.gamma):
        colours = _apply(colours, essence.profile)
    if colours.mode != "RGB":
        colours = colours.convert("RGB")
    if alpha is None:
        return colours
    on_white = Image.new("RGB", colours.size, "white")
    on_white.paste(colours, mask=alpha)
    return on_white


def _split(
    image: Image.Image, essence: Essence, low: Image.Image | None
) -> tuple[Image.Image, Image.Image | None]:
    """Colours as L, RGB or CMYK, and alpha where there is any."""
    key = essence.key
    if image.mode.startswith("I"):  # 16 bits of grey
        wide = image.convert("I")
        alpha = wide.point([255 * (value != key[0]) for value in range(65536)], "L") if key else None
        return wide.point(_curve(essence.gamma), "L"), alpha
    if image.mode == "P":
        mode = "RGBA" if image.has_transparency_data else "RGB"
        image = image.convert(mode)
    if image.mode == "1":
        image = image.convert("L")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.mode == "RGBA":
        return image.convert("RGB"), image.getchannel("A")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if not key or len(key) != len(image.getbands()):
        return image, None
    if low is not None:
        high_key, low_key = [sample >> 8 for sample in key], [sample & 255 for sample in key]
        return image, ImageChops.lighter(_differs(image, high_key), _differs(low, low_key))
    highest = (1 << min(essence.depth, 8)) - 1
    return image, _differs(image, [sample * 255 // highest for sample in key])


def _differs(image: Image.Image, key: Sequence[int]) -> Image.Image:
    """255 where any channel is not at its level of the key, else 0."""
    masks = [
        channel.point([255 * (value != level) for value in range(256)])
        for channel, level in zip(image.split(), key, strict=True)
    ]
    return reduce(ImageChops.lighter, masks)


def _curve(gamma: float) -> list[int]:
    """16 bits to 8: all of a dark scene may lie in the first of 256 levels before its gamma is undone."""
    if not gamma:
        return _TO_8_BITS
    return [round(255 * to_srgb((value / 65535) ** (1 / gamma))) for value in range(65536)]


def _apply(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode == "L":
        levels = _grey_levels(profile)
        return image if levels is None else image.point(levels)
    found = _transform(profile, image.mode)
    return image if found is None else _changed(image, found)


@lru_cache(maxsize=8)
def _grey_levels(profile: bytes) -> list[int] | None:
    """What each level of grey comes to; profiles of colours say it too."""
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    if (found := _transform(profile, "L")) is not None:
        return list(_changed(ramp, found).getchannel("G").tobytes())
    if (found := _transform(profile, "RGB")) is not None:
        return list(_changed(ramp.convert("RGB"), found).getchannel("G").tobytes())
    return None


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB; None where it is damaged, for pixels of another kind, or sRGB itself."""
    if not 128 < len(profile) <= _MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space, kind = source.profile.xcolor_space.ljust(4), source.profile.device_class
        if _MODES.get(space) != mode or kind in ("link", "nmcl", "abst"):
            return None
        # A table of grey is made once, and exactly; the others work through millions of pixels, and quickly.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        target = ImageCms.createProfile("sRGB")
        found = ImageCms.buildTransform(source, target, mode, "RGB", flags=flags)
        if mode == "RGB" and _is_srgb(found):
            return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return found


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it changes nothing, tried on a coarse lattice of colours: most profiles are sRGB's."""
    levels = [round(255 * step / (_PROBE_STEPS - 1)) for step in range(_PROBE_STEPS)]
    pixels = bytes(value for r in levels for g in levels for b in levels for value in (r, g, b))
    probe = Image.frombytes("RGB", (_PROBE_STEPS**2, _PROBE_STEPS), pixels)
    ranges = ImageChops.difference(_changed(probe, transform), probe).getextrema()
    return all(isinstance(pair, tuple) and pair[1] <= _NO_DIFFERENCE for pair in ranges)


def _changed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    changed = ImageCms.applyTransform(image, transform)
    assert changed is not None
    return changed
