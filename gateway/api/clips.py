"""Owns videos as clients send them: their frames as pictures, and when each was shown. No sockets; gateway's loop.

Two spellings: vLLM's one data URL with all frames, and the list that Qwen's tools take. No video file is ever decoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from gateway.api.fields import Known
from gateway.api.parameters import invalid
from gateway.generation import Core, PreparedImage, RequestError, ServedModel, Shown
from shared.clips import MOST_SECONDS, ClipTimes, clip_text, evenly, moments
from shared.errors import ErrorCode
from shared.protocol import ClipSpec, ImageSpec, ModelCard

INSTEAD: Final = "send frames of it, data:video/jpeg;base64,<frame>,<frame>,… with each frame a picture's file, and their fps"
_FRAME_TYPES: Final = ("video/jpeg", "video/jpg", "video/png", "video/webp")
_HEAD: Final = re.compile(r"[\0- ]*data:(?P<type>[^;,]{0,200})(?P<parameters>[^,]{0,1000}),", re.IGNORECASE)
_AT_ONCE: Final = (
    4  # frames of one clip that wait for the picture processes, so that others' pictures get between
)
_INDICES: Final = "media_io_kwargs.video.frames_indices"
_MOST_FPS: Final = 1000.0
_MOST_FRAMES: Final = 4096  # that are looked at at all; each model has a bound of its own

Seconds = Annotated[float, Meta(ge=0.0, le=MOST_SECONDS)]
Rate = float | str  # clients write numbers as texts here
Timestamps = Annotated[list[Seconds], Meta(max_length=_MOST_FRAMES)]


class VideoUrl(Known, kw_only=True):
    """`video_url` of a content part."""

    url: str


class VideoUrlPart(Known, tag_field="type", tag="video_url", kw_only=True):
    """Frames of a video in one data URL."""

    IGNORED = ("cache_control", "prompt_cache_breakpoint", "uuid")

    video_url: VideoUrl
    fps: Rate | None = None
    timestamps: Timestamps | None = None
    duration: Seconds | None = None
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    uuid: str | None = None

    @property
    def field(self) -> str:
        """The name of the field that has the frames, within the part."""
        return "video_url.url"

    def chars(self) -> int:
        """Characters of its URLs."""
        return len(self.video_url.url)


class VideoPart(Known, tag_field="type", tag="video", kw_only=True):
    """Frames of a video as a list of pictures' data URLs, or all in one."""

    IGNORED = ("cache_control", "prompt_cache_breakpoint", "uuid")

    video: str | Annotated[list[str], Meta(max_length=_MOST_FRAMES)]
    fps: Rate | None = None
    sample_fps: Rate | None = None
    timestamps: Timestamps | None = None
    duration: Seconds | None = None
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    uuid: str | None = None

    @property
    def field(self) -> str:
        """As of `VideoUrlPart`."""
        return "video"

    def chars(self) -> int:
        """Characters of its URLs."""
        return len(self.video) if isinstance(self.video, str) else sum(map(len, self.video))


ClipPart = VideoUrlPart | VideoPart


class FrameFacts(Known, kw_only=True):
    """`media_io_kwargs.video`: where the frames stood in the video that they were taken of."""

    fps: Rate | None = None  # of the video
    frames_indices: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=_MOST_FRAMES)] | None = None
    total_num_frames: Annotated[float, Meta(gt=0)] | None = None
    duration: Seconds | None = None
    do_sample_frames: bool | None = None


class MediaFacts(Known, kw_only=True):
    """`media_io_kwargs`."""

    video: FrameFacts | None = None


class ProcessorAsked(Known, kw_only=True):
    """`mm_processor_kwargs`."""

    fps: Rate | list[Rate] | None = None  # of frames; a list has one for each video
    do_sample_frames: bool | None = None


@dataclass(frozen=True, slots=True)
class Clip:
    """A video that was asked about: the frames' data URLs with their fields' names, and when they were shown."""

    frames: list[tuple[str, str]]
    times: ClipTimes | None  # None: the client did not say
    param: str


@dataclass(frozen=True, slots=True)
class PreparedClip:
    """Its groups of frames, prepared, and what stands for them in the prompt's text."""

    images: list[PreparedImage]
    shown: Shown


# ---------------------------------------------------------------- what was sent


def clip_of(part: ClipPart, where: str) -> Clip:
    """What a part asks about; `where` is its field's name. Raises `RequestError`."""
    param = f"{where}.{part.field}"
    if isinstance(part, VideoUrlPart):
        frames = _split(part.video_url.url, param)
        fps, name = part.fps, "fps"
    else:
        if isinstance(part.video, str):
            frames = _split(part.video, param)
        else:
            frames = [(url, f"{param}[{number}]") for number, url in enumerate(part.video)]
        fps, name = (part.fps, "fps") if part.sample_fps is None else (part.sample_fps, "sample_fps")
        if part.sample_fps is not None and part.fps not in (None, part.sample_fps):
            raise invalid("give either fps or sample_fps", f"{where}.fps")
    if not frames:
        raise invalid("a video has at least one frame", param)
    if part.timestamps is not None:
        return Clip(frames, _at(part, fps, len(frames), where), param)
    if fps is None:
        times = None if part.duration is None else _over(len(frames), part.duration)
    else:
        times = _evenly(len(frames), _rate(fps, f"{where}.{name}"), part.duration, f"{where}.{name}")
    return Clip(frames, times, param)


def settle_times(
    parts: Sequence[tuple[ClipPart, str]], media: MediaFacts | None, asked: ProcessorAsked | None
) -> None:
    """Give parts that say nothing of their times those of the request's other fields, where vLLM's clients have them.

    Raises `RequestError` naming the field.
    """
    if media is None and asked is None:
        return
    facts = FrameFacts() if media is None or media.video is None else media.video
    for name, given in (("media_io_kwargs.video", facts), ("mm_processor_kwargs", asked)):
        if given is not None and given.do_sample_frames:
            raise invalid("all frames that are sent are read; leave it out", f"{name}.do_sample_frames")
    rates = asked.fps if asked is not None else None
    for number, (part, where) in enumerate(parts):
        if (
            part.timestamps is not None
            or part.fps is not None
            or getattr(part, "sample_fps", None) is not None
        ):
            continue
        own = rates if not isinstance(rates, list) else rates[number] if number < len(rates) else None
        num_frames = len(clip_of(part, where).frames)
        if part.duration is None:
            part.duration = facts.duration
        if facts.fps is not None:
            rate = _rate(facts.fps, "media_io_kwargs.video.fps")
            if facts.frames_indices is not None:
                if len(facts.frames_indices) != num_frames:
                    text = f"{len(facts.frames_indices)} indices for {num_frames} frames; each frame has one"
                    raise invalid(text, _INDICES)
                part.timestamps = [index / rate for index in facts.frames_indices]
                if sorted(part.timestamps) != part.timestamps or part.timestamps[-1] > MOST_SECONDS:
                    raise invalid(f"frames are sent in order, within {MOST_SECONDS:g} seconds", _INDICES)
            elif facts.total_num_frames is not None:
                part.fps = num_frames / facts.total_num_frames * rate
            else:
                part.fps = rate
        elif own is not None:
            part.fps = _rate(own, "mm_processor_kwargs.fps")


def _split(url: str, param: str) -> list[tuple[str, str]]:
    """The frames of one data URL, each as a picture's. Raises `RequestError` for a video's file."""
    head = _HEAD.match(url)
    if head is None:
        raise invalid(f"videos are not fetched, and their files not decoded: {INSTEAD}", param)
    media_type = head["type"].strip().lower()
    if media_type not in _FRAME_TYPES and not media_type.startswith("image/"):
        raise invalid(
            f"video files ({media_type[:100] or 'of no type'}) are not decoded here: {INSTEAD}", param
        )
    if "base64" not in [name.strip().lower() for name in head["parameters"].split(";")]:
        raise invalid(f"the data URL does not say ;base64: {INSTEAD}", param)
    if url.count(",", head.end()) >= _MOST_FRAMES:
        raise invalid(f"a video has at most {_MOST_FRAMES} frames here, and a model fewer", param)
    bodies = url[head.end() :].split(",")
    for number, body in enumerate(bodies):
        if not body.strip():
            raise invalid(f"frame {number} of {len(bodies)} is empty", param)
    return [(f"data:image/jpeg;base64,{body}", param) for body in bodies]


def _rate(given: Rate, param: str) -> float:
    try:
        rate = float(given)
    except ValueError:
        rate = 0.0
    if not math.isfinite(rate) or not 0 < rate <= _MOST_FPS:
        raise invalid(f"frames a second are a number above 0 and up to {_MOST_FPS:g}", param)
    return rate


def _at(part: ClipPart, fps: Rate | None, num_frames: int, where: str) -> ClipTimes:
    times, param = part.timestamps or [], f"{where}.timestamps"
    if fps is not None:
        raise invalid("give either timestamps or fps", param)
    if len(times) != num_frames:
        raise invalid(f"{len(times)} times for {num_frames} frames; each frame has one", param)
    if not all(before <= after for before, after in itertools.pairwise(times)):
        raise invalid("frames are sent in the order of their times", param)
    if times[-1] > MOST_SECONDS:
        raise invalid(f"times lie within {MOST_SECONDS:g} seconds", param)
    return ClipTimes(tuple(times), duration=part.duration)


def _evenly(num_frames: int, fps: float, duration: float | None, param: str) -> ClipTimes:
    if (num_frames - 1) / fps > MOST_SECONDS:
        raise invalid(
            f"{num_frames} frames are longer than {MOST_SECONDS:g} seconds at {fps:g} a second", param
        )
    return evenly(num_frames, fps, duration)


def _over(num_frames: int, duration: float) -> ClipTimes | None:
    """Frames that are spread over a video of this length."""
    return evenly(num_frames, num_frames / duration, duration) if duration > 0 else None


# ---------------------------------------------------------------- prepared


def no_clips(card: ModelCard, param: str) -> RequestError:
    """The refusal of a video, in the field `param`, by a model that reads none."""
    message = f"model {card.model_id} reads no videos, not as frames either"
    if card.image is None:
        message += ": it reads text only"
    else:
        message += f"; send single frames as pictures (image_url), at most {card.image.max_images} a request"
    return RequestError(ErrorCode.UNSUPPORTED, message, param=param)


async def prepare_clips(core: Core, model: ServedModel, clips: Sequence[Clip]) -> list[PreparedClip]:
    """Every frame decoded and resized, and put into groups. Raises `RequestError` of the first that is refused."""
    if not clips:
        return []
    spec = model.card.image
    if spec is None or spec.clip is None:
        raise no_clips(model.card, clips[0].param)
    total = 0
    for clip in clips:
        total += len(clip.frames)
        if total > spec.clip.max_frames:
            message = (
                f"{total} frames; model {model.card.model_id} takes at most {spec.clip.max_frames} a request"
            )
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=clip.param)
    return [await _prepare(core, model, spec, spec.clip, clip) for clip in clips]


async def _prepare(
    core: Core, model: ServedModel, spec: ImageSpec, own: ClipSpec, clip: Clip
) -> PreparedClip:
    num_frames = len(clip.frames)
    times = clip.times or evenly(num_frames, own.fps)
    frames: list[PreparedImage] = []
    for at in range(0, num_frames, _AT_ONCE):
        prepared = await asyncio.gather(
            *(
                core.prepare_image(model, url, param=param, num_frames=num_frames)
                for url, param in clip.frames[at : at + _AT_ONCE]
            ),
            return_exceptions=True,
        )
        for number, one in enumerate(prepared, at):
            if isinstance(one, RequestError) and one.param == clip.param:
                one.message = f"frame {number}: {one.message}"
            if isinstance(one, BaseException):
                raise one
            frames.append(one)
    images = []
    for number, moment in enumerate(moments(own, times)):
        group = frames[number * own.group : (number + 1) * own.group]
        images.append(_joined(group, clip, number * own.group, frames[0]))
        sheets = images[-1].spec
        is_continued = bool(own.steps_per_second and number)
        placed = msgspec.structs.replace(
            sheets, num_frames=len(group), moment=moment, is_continued=is_continued
        )
        images[-1] = PreparedImage(placed, images[-1].frames)
    return PreparedClip(images, Shown(own.layout.placeholder, clip_text(spec, times)))


def _joined(group: Sequence[PreparedImage], clip: Clip, at: int, first: PreparedImage) -> PreparedImage:
    """A group's frames as one picture, one below the other. Raises `RequestError` for frames of other sizes than the first."""
    (sheet,) = first.spec.sheets
    for number, frame in enumerate(group, at):
        if frame.spec.sheets != [sheet]:
            (other,) = frame.spec.sheets
            text = (
                f"frame {number} becomes {other.width}×{other.height} pixels and the first {sheet.width}×{sheet.height}; "
                "frames of a video have one size"
            )
            raise invalid(text, clip.frames[number][1])
    if len(group) == 1:
        return group[0]
    whole = msgspec.structs.replace(sheet, rows=len(group), height=len(group) * sheet.height)
    digest = hashlib.sha256(msgspec.msgpack.encode(whole))
    for frame in group:
        digest.update(frame.spec.digest)
    made = msgspec.structs.replace(group[0].spec, sheets=[whole], digest=digest.digest())
    return PreparedImage(made, [b"".join(frame.frames[0] for frame in group)])
