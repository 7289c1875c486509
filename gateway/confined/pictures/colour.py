"""Owns turning decoded pixels of any kind to RGB as browsers show them: profiles, transparency on white.

Runs in a picture process. Transforms of the last few profiles are remembered.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Final

from PIL import Image, ImageChops, ImageCms

from gateway.confined.pictures.essence import Essence
from gateway.confined.pictures.profiles import to_srgb

_MAX_PROFILE_BYTES: Final = 4 << 20
_MODES: Final = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_PROBE_STEPS: Final = 9
_NO_DIFFERENCE: Final = 2  # levels of 255: such a profile is sRGB written down by another program
_TO_8_BITS: Final = [(value + 128) // 257 for value in range(65536)]


def to_rgb(image: Image.Image, essence: Essence) -> Image.Image:
    """The picture in sRGB, not yet upright; what is transparent is white."""
    colours, alpha = _split(image, essence)
    if essence.profile and not (image.mode.startswith("I") and essence.gamma):
        colours = _apply(colours, essence.profile)
    colours = colours.convert("RGB")
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _split(image: Image.Image, essence: Essence) -> tuple[Image.Image, Image.Image | None]:
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
    highest = (1 << min(essence.depth, 8)) - 1
    alpha = None
    for channel, sample in zip(image.split(), key, strict=True):
        level = sample * 255 // highest
        differs = channel.point([255 * (value != level) for value in range(256)])
        alpha = differs if alpha is None else ImageChops.lighter(alpha, differs)
    return image, alpha


def _curve(gamma: float) -> list[int]:
    """16 bits to 8: all of a dark scene may lie in the first of 256 levels before its gamma is undone."""
    if not gamma:
        return _TO_8_BITS
    return [round(255 * to_srgb((value / 65535) ** (1 / gamma))) for value in range(65536)]


def _apply(image: Image.Image, profile: bytes) -> Image.Image:
    found = _transform(profile, image.mode)
    if found is None and image.mode == "L":
        found = _transform(profile, "RGB")
        image = image.convert("RGB") if found is not None else image
    if found is None:
        return image
    changed = ImageCms.applyTransform(image, found)
    assert changed is not None
    return changed


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB; None where it is damaged, for pixels of another kind, or sRGB itself."""
    if not 128 < len(profile) <= _MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODES.get(source.profile.xcolor_space.ljust(4)) != mode or source.profile.device_class in (
            "link",
            "nmcl",
            "abst",
        ):
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        probe = _probe(mode)
        changed = ImageCms.applyTransform(probe, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    assert changed is not None
    if mode == "CMYK":
        return transform
    ranges = ImageChops.difference(changed, probe.convert("RGB")).getextrema()
    return transform if max(pair[1] for pair in ranges if isinstance(pair, tuple)) > _NO_DIFFERENCE else None


def _probe(mode: str) -> Image.Image:
    """Every colour on a coarse lattice."""
    if mode != "RGB":
        return Image.linear_gradient("L").convert(mode)
    levels = [round(255 * step / (_PROBE_STEPS - 1)) for step in range(_PROBE_STEPS)]
    pixels = bytes(value for r in levels for g in levels for b in levels for value in (r, g, b))
    return Image.frombytes("RGB", (_PROBE_STEPS**2, _PROBE_STEPS), pixels)
