"""Owns how Qwen3-VL and Qwen2.5-VL read frames of videos: in pairs, with times as text or on the axis of positions. Decode thread."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from shared.protocol import ClipLayout, ClipSize, ClipSpec, FreeSize, ImageSpec
from worker.formats.source import Source
from worker.models.dense_config import DenseConfig
from worker.models.free_tower import FreeConfig
from worker.models.picture_plan import MAX_FRAMES, MOST_CLIP_TOKENS, Preprocessor, read_clip_preprocessor
from worker.models.settings import Settings

# What the classes of transformers have where a folder says nothing.
_PATCHES: dict[str, Any] = {"resample": 3, "temporal_patch_size": 2, "merge_size": 2}
_CLIP3: dict[str, Any] = {
    **_PATCHES,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": 16,
}
_CLIP25: dict[str, Any] = {
    **_PATCHES,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
}
_FPS = 2.0  # at which the makers' tools take frames
_PAD, _CLIP_PAD = "<|image_pad|>", "<|video_pad|>"
_BEGIN, _END = "<|vision_start|>", "<|vision_end|>"
# What stands for features leaves the prompt, so that it may be the mark of pictures here too.
CLIP25 = ClipLayout(placeholder=_CLIP_PAD, frame=_PAD)
# The template's marks make way for those of each group, as in the processor that the makers released; that of transformers 5
# leaves them around all of it.
CLIP3 = ClipLayout(placeholder=_BEGIN + _CLIP_PAD + _END, frame="<{seconds} seconds>" + _BEGIN + _PAD + _END)


def check_patches(said: Settings, tower: FreeConfig) -> None:
    """Raises CheckpointError unless the processor cuts the patches that the tower reads."""
    for name, wanted in (
        ("patch_size", tower.patch_size),
        ("merge_size", tower.merge),
        ("temporal_patch_size", tower.frames),
    ):
        if said.size(name) != wanted:
            raise said.fault(
                f"{name!r} is {said.size(name)}, and the vision tower of config.json has {wanted}"
            )


def clip3(
    source: Source, pictures: Preprocessor, tower: FreeConfig, sizes: DenseConfig, spec: ImageSpec
) -> ClipSpec:
    """Times are written in front of each group, which stands at a place of its own; all frames share an area."""
    processor = read_clip_preprocessor(source, pictures, _CLIP3)
    size = Settings({**processor.settings.objects("size")}, processor.settings.file)
    least, most = size.size("shortest_edge"), size.size("longest_edge")
    return _clip(processor, tower, sizes, spec, ClipSize(min(least, most), most), CLIP3)


def clip25(
    source: Source,
    pictures: Preprocessor,
    tower: FreeConfig,
    sizes: DenseConfig,
    spec: ImageSpec,
    rate: float,
) -> ClipSpec:
    """Groups stand side by side, at one place but for their times; each frame has an area of its own."""
    processor = read_clip_preprocessor(source, pictures, _CLIP25)
    said = processor.settings
    size = Settings({**said.objects("size")}, said.file)
    least = said.size("min_pixels", size.size("shortest_edge", 128 * 28 * 28))
    most = said.size("max_pixels", size.size("longest_edge", 28 * 28 * 768))
    clip = _clip(processor, tower, sizes, spec, FreeSize(min(least, most), most), CLIP25)
    return replace(clip, steps_per_second=rate)


def _clip(
    processor: Preprocessor,
    tower: FreeConfig,
    sizes: DenseConfig,
    spec: ImageSpec,
    rule: FreeSize,
    layout: ClipLayout,
) -> ClipSpec:
    check_patches(processor.settings, tower)
    assert isinstance(spec.rule, FreeSize)
    return ClipSpec(
        rule,
        processor.resample,
        layout,
        max_frames=MAX_FRAMES,
        fps=processor.settings.above_0("fps", _FPS),
        group=tower.frames,
        max_tokens=min(MOST_CLIP_TOKENS, max(1, sizes.context_tokens // 2)),
        max_group_tokens=spec.rule.max_pixels // tower.unit**2,
    )
