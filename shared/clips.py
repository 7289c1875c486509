"""Owns what a clip becomes by a model's `ClipSpec`: pictures with times, read as frames of one video. Pure; both sides of the wire.

A clip's frames travel as groups: pictures of their own, each with as many positions as one frame, so that they are shared out
over steps, kept and found again like other pictures. What makes a video of them is the text around them, and where positions
have a time axis, their moments on it. Times are seconds.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from msgspec.structs import replace

from shared.image_spec import ClipSize, ClipSpec, FreeSize, ImageInput, ImageSpec, Sheet
from shared.pictures import fault_of, grid_of

MOST_SECONDS: Final = 86400.0
_ONES: Final = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS: Final = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True, slots=True)
class ClipTimes:
    """When each frame was shown. `fps` where they are evenly spaced from 0 on, else 0; `duration` of the video, if it is known."""

    seconds: tuple[float, ...]
    fps: float = 0.0
    duration: float | None = None


def evenly(num_frames: int, fps: float, duration: float | None = None) -> ClipTimes:
    """Frames that are spaced alike, the first at 0."""
    return ClipTimes(tuple(index / fps for index in range(num_frames)), fps, duration)


@lru_cache
def frame_spec(spec: ImageSpec, num_frames: int) -> ImageSpec:
    """How each frame of a clip of so many is prepared, as if it were a picture. The spec must have a clip's."""
    clip = spec.clip
    assert clip is not None
    rule = clip.rule
    if isinstance(rule, FreeSize):
        square = spec.crop_size**2 // spec.crop_tokens
        num_groups = -(-num_frames // clip.group)
        most_tokens = clip.max_group_tokens or clip.max_tokens or rule.max_pixels // square
        if clip.max_tokens:
            most_tokens = min(most_tokens, max(1, clip.max_tokens // num_groups))
        most = most_tokens * square  # of a frame
        if isinstance(rule, ClipSize):
            # An odd number counts as an even one, of which each frame could have more than its share.
            counted = min(max(2, num_frames), 2 * round(max(2, num_frames) / 2))
            most = min(rule.max_pixels, most * counted)
            rule = ClipSize(min(rule.min_pixels, most), most, num_frames)
        else:
            most = min(rule.max_pixels, most)
            rule = FreeSize(min(rule.min_pixels, most), most)
    return replace(spec, rule=rule, resample=clip.resample, clip=None)


def fault_of_input(spec: ImageSpec, image: ImageInput) -> str:
    """What is wrong with a picture's sheets, or those of a group of frames, in words; empty if this spec can have made them."""
    if not image.num_frames and not image.moment and not image.is_continued:
        return fault_of(spec, image.sheets)
    clip = spec.clip
    if clip is None:
        return "this model reads no frames of videos"
    if not 1 <= image.num_frames <= clip.group or len(image.sheets) != 1:
        return f"a group has 1 to {clip.group} frames of a video, in one sheet"
    if image.moment < 0 or (not clip.steps_per_second and (image.moment or image.is_continued)):
        return "a group of frames has a moment that this model has no time for"
    sheet, num_frames = image.sheets[0], image.num_frames
    if clip.group > 1:
        if sheet.rows != num_frames or sheet.height % num_frames:
            return f"a group of {num_frames} frames has them one below the other"
        sheet = Sheet(1, sheet.cols, sheet.height // num_frames, sheet.width)
    return fault_of(frame_spec(spec, clip.group), [sheet])


def moments(clip: ClipSpec, times: ClipTimes) -> list[int]:
    """Of each group, its steps on the time axis behind the first. Evenly spaced ones in single precision, as the models'
    reference has them; others by the times of their groups' first frames."""
    rate, firsts = clip.steps_per_second, times.seconds[:: clip.group]
    if not rate:
        return [0] * len(firsts)
    if times.fps:
        step = _single(rate * _single(clip.group / times.fps))
        return [int(_single(index * step)) for index in range(len(firsts))]
    return [math.floor(rate * (at - firsts[0]) + 1e-6) for at in firsts]


def clip_text(spec: ImageSpec, times: ClipTimes) -> str:
    """What stands for a clip in a prompt's text, with `layout.run` for each group."""
    clip = spec.clip
    assert clip is not None
    layout, seconds = clip.layout, times.seconds
    whole = int(seconds[-1] if times.duration is None else times.duration)
    before = layout.before.replace("{frames_in_words}", in_words(len(seconds))).replace(
        "{duration}", f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    )
    groups = [seconds[at : at + clip.group] for at in range(0, len(seconds), clip.group)]
    written = [
        layout.frame.replace("{number}", str(number))
        .replace("{clock}", f"{int(own[0] // 60):02d}:{int(own[0] % 60):02d}")
        .replace("{seconds}", f"{(own[0] + own[-1]) / 2:.1f}")
        for number, own in enumerate(groups, 1)
    ]
    return before + layout.gap.join(written) + layout.after


def num_positions(spec: ImageSpec, num_ids: int, images: Sequence[ImageInput]) -> int:
    """Positions that a prompt of so many ids and its pictures reaches on the longest axis; what follows goes on behind them.

    Where positions have one axis these are its tokens. Pictures have their runs.
    """
    if spec.position_axes == 1:
        return num_ids + sum(num for image in images for _, num in image.runs)
    at = seen = latest = begin = 0
    for image in images:
        place = image.runs[0][0]
        at, seen = at + place - seen, place
        begin = begin if image.is_continued else at
        latest = max(latest, begin + image.moment + 1)
        at = begin + max(grid_of(spec, image.sheets))
    return max(latest, at + num_ids - seen)


def in_words(number: int) -> str:
    """A number below a thousand in English."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")


def _single(value: float) -> float:
    """The nearest number of single precision."""
    single: float = struct.unpack("f", struct.pack("f", value))[0]
    return single
