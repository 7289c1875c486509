"""Owns what a folder says of preparing pictures: preprocessor_config.json, or its part of processor_config.json. Decode thread.

A step that the processor would take and nobody takes here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from shared.protocol import ClipSpec
from worker.formats.json_files import read_object
from worker.formats.source import CheckpointError, Source
from worker.models.settings import Settings

MAX_IMAGES = 16
"""Pictures of one request: their crops are encoded one after another, and their tokens fill the context."""

MAX_FRAMES = 128
"""Frames of videos of one request."""

MOST_CLIP_TOKENS = 8192
"""Positions of a video where its frames can be made smaller: what half of the context holds, if that is less."""

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_FILES = ("processor_config.json", "preprocessor_config.json")
_CLIP_FILE = "video_preprocessor_config.json"

log = structlog.get_logger(__name__)
Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """The picture's part of a folder's processor, over the defaults of its class."""

    settings: Settings

    @property
    def resample(self) -> str:
        """The filter's name."""
        named = self.settings.get("resample")
        if named not in _RESAMPLE:
            raise self.settings.fault(
                f"'resample' is {named!r}; supported are {', '.join(map(str, _RESAMPLE))}"
            )
        return _RESAMPLE[named]

    @property
    def mean(self) -> Triple:
        """Of each channel, as parts of 1."""
        return self._triple("image_mean")

    @property
    def std(self) -> Triple:
        """Of each channel, as parts of 1."""
        return self._triple("image_std")

    def side(self, name: str) -> int:
        """A setting that describes a square: a number, or an object of edges that are alike."""
        value = self.settings.get(name)
        edges = set(value.values()) if isinstance(value, dict) else {value}
        (edge,) = edges if len(edges) == 1 else (None,)
        if isinstance(edge, bool) or not isinstance(edge, int) or edge < 1:
            raise self.settings.fault(f"{name!r} is {value!r}; a square's side is expected")
        return edge

    def check_side(self, name: str, crop_size: int) -> None:
        """Raises CheckpointError unless that square is the one that the vision tower has positions for."""
        side = self.side(name)
        if side != crop_size:
            raise self.settings.fault(
                f"{name!r} is {side} pixels, and the vision tower of config.json reads crops of {crop_size}"
            )

    def _triple(self, name: str) -> Triple:
        value = self.settings.get(name)
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise self.settings.fault(f"{name!r} is not a list of three numbers")
        if any(isinstance(one, bool) or not isinstance(one, int | float) for one in value):
            raise self.settings.fault(f"{name!r} is not a list of three numbers")
        first, second, third = map(float, value)
        if name.endswith("std") and min(first, second, third) <= 0:
            raise self.settings.fault(f"{name!r} has a number that is not above 0")
        return first, second, third


def read_preprocessor(source: Source, defaults: dict[str, Any]) -> Preprocessor:
    """Raises CheckpointError where no file says how pictures are prepared, or says something that is not done here."""
    file = source.path / _FILES[0]
    found = read_object(file).get("image_processor")
    if not isinstance(found, dict):
        file = source.path / _FILES[1]
        found = read_object(file)
    if not found:
        raise CheckpointError(
            f"no {_FILES[1]}: nothing says how pictures are prepared; take that file from the model's own folder",
            file=source.path,
        )
    return _preprocessor(found, file, defaults)


def clip_or_none(read: Callable[[], ClipSpec]) -> ClipSpec | None:
    """What `read` finds of frames of videos; None, and the reason logged, where the folder says what is not done here: its
    pictures are read nevertheless."""
    try:
        return read()
    except CheckpointError as error:
        log.warning("no_frames_of_videos", reason=str(error))
        return None


def read_clip_preprocessor(source: Source, pictures: Preprocessor, defaults: dict[str, Any]) -> Preprocessor:
    """How frames of videos are prepared, by the file that transformers takes for it: of folders without one of its own that of
    pictures. Raises CheckpointError as `read_preprocessor`, and for frames that are normalised otherwise than pictures."""
    file = source.path / _FILES[0]
    found = read_object(file).get("video_processor")
    for name in (_CLIP_FILE, _FILES[1]):
        if isinstance(found, dict) and found:
            break
        file = source.path / name
        found = read_object(file)
    if not found:
        raise CheckpointError(f"no {_CLIP_FILE}: nothing says how frames are prepared", file=source.path)
    clip = _preprocessor(found, file, defaults)
    if (clip.mean, clip.std) != (pictures.mean, pictures.std):
        raise clip.settings.fault(
            "'image_mean' or 'image_std' is not that of pictures, whose tower it is too"
        )
    return clip


def _preprocessor(found: dict[str, Any], file: Path, defaults: dict[str, Any]) -> Preprocessor:
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    settings = Settings(common | defaults | {k: v for k, v in found.items() if v is not None}, file)
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not settings.flag(name):
            raise settings.fault(f"{name!r} is false; pictures are always resized and normalised here")
    factor = settings.above_0("rescale_factor")
    if abs(factor * 255 - 1) > 1e-3:
        raise settings.fault(f"'rescale_factor' is {factor!r}; supported is 1/255")
    return Preprocessor(settings)
