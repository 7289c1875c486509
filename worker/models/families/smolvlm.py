"""Owns SmolVLM, SmolVLM2 and Idefics3: SigLIP, patches joined by squares, one product, a Llama. Decode thread."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from shared.pictures import max_crops
from shared.protocol import ClipLayout, ClipSpec, EdgeTiles, ImageLayout, ImageSpec
from worker.formats.source import Source, Target
from worker.models.families.llama import read as read_llama
from worker.models.linear import PackedLinear, Take
from worker.models.picture_model import PictureParts, Project, picture_family, section, text_settings
from worker.models.picture_plan import (
    MAX_FRAMES,
    MAX_IMAGES,
    Preprocessor,
    clip_or_none,
    read_clip_preprocessor,
    read_preprocessor,
)
from worker.models.settings import Settings
from worker.models.vision_tower import (
    Tower,
    TowerConfig,
    read_tower,
    take_siglip,
    tokens_of,
    unshuffled,
)

# What the classes of transformers have where a folder says nothing.
_TEXT: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
_VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
}
_PROCESSOR: dict[str, Any] = {
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "resample": 1,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_CLIP_EDGE = 4 * 364  # that frames are first scaled to, where a folder says nothing
_CLIP_FRAMES = 64  # that the models were trained to see at most
_AROUND, _WHOLE, _RUN = "<fake_token_around_image>", "<global-img>", "<image>"
LAYOUT = ImageLayout(
    placeholder=_RUN,
    run=_RUN,
    whole=_AROUND + _WHOLE + _RUN + _AROUND,
    tile=_AROUND + "<row_{row}_col_{col}>" + _RUN,
    row_end="\n",
    overview="\n" + _AROUND + _WHOLE + _RUN + _AROUND,
)


CLIP_LAYOUT = ClipLayout(
    # No placeholder: the templates of released folders pass over videos.
    before="You are provided the following series of {frames_in_words} frames from a {duration} [H:MM:SS] video.\n",
    frame="\nFrame from {clock}:" + LAYOUT.whole,
    after="\n\n",
)


def rename(stored: str) -> Target:
    """The decoder's tensors under its own names; the others without the first `model.`."""
    return Target(
        re.sub(r"^(model\.)?text_model\.", "model.", stored).replace("model.connector.", "connector.")
    )


def read(settings: Settings, source: Source) -> PictureParts:
    """See `PictureParts`. Raises CheckpointError."""
    text = text_settings(settings, _TEXT)
    if text.get("model_type", "llama") != "llama":
        raise text.fault(f"'text_config.model_type' is {text.get('model_type')!r}; supported is llama")
    processor = read_preprocessor(source, _PROCESSOR)
    vision = section(settings, "vision_config", _VISION)
    tower = read_tower(vision, processor.mean, processor.std)
    factor = settings.size("scale_factor", 2)
    processor.check_side("max_image_size", tower.crop_size)
    spec = ImageSpec(
        tower.crop_size,
        tokens_of(settings, tower, factor),
        EdgeTiles(processor.side("size"), processor.settings.flag("do_image_splitting")),
        processor.resample,
        LAYOUT,
        max_images=MAX_IMAGES,
    )
    sizes = read_llama(text)
    build = partial(_build, tower, factor, sizes.dim, max_crops(spec))
    return PictureParts(text, sizes, spec, rename, build)


def read_with_clips(settings: Settings, source: Source) -> PictureParts:
    """As `read`, of a model that was trained on videos as well."""
    parts = read(settings, source)
    pictures = read_preprocessor(source, _PROCESSOR)

    def clip() -> ClipSpec:
        found = read_clip_preprocessor(source, pictures, {**_PROCESSOR, "size": None}).settings
        sampling = Settings(found.objects("video_sampling"), found.file)
        sizes = {"size": found.get("size", sampling.get("video_size", {"longest_edge": _CLIP_EDGE}))}
        processor = Preprocessor(Settings({**found.values, **sizes}, found.file))
        processor.check_side("max_image_size", parts.spec.crop_size)
        return ClipSpec(
            EdgeTiles(processor.side("size"), is_split=False),
            processor.resample,
            CLIP_LAYOUT,
            max_frames=min(MAX_FRAMES, sampling.size("max_frames", found.size("num_frames", _CLIP_FRAMES))),
            fps=sampling.above_0("fps", found.above_0("fps", 1.0)),
        )

    return dataclasses.replace(parts, spec=replace(parts.spec, clip=clip_or_none(clip)))


def _build(config: TowerConfig, factor: int, dim: int, most: int, take: Take) -> tuple[Tower, Project]:
    name = "model.vision_model"
    table = take(f"{name}.embeddings.position_embedding.weight", config.num_patches, config.dim)
    tower = take_siglip(take, name, config, most, table[_places(config.grid).to(table.device)])
    joined = config.dim * factor * factor
    product = PackedLinear(take("connector.modality_projection.proj.weight", dim, joined))

    def project(features: Tensor) -> Tensor:
        return product(unshuffled(features, factor))

    return tower, project


def _places(grid: int) -> Tensor:
    """Which learned position each patch of a whole crop has, row by row.

    By the steps of transformers' class, in whose floating point two neighbours may share one: so the models were trained.
    """
    edges = torch.arange(1 / grid, 1.0, 1 / grid)
    fractions = torch.clamp(
        torch.arange(grid, dtype=torch.float32) * (1.0 / torch.tensor(grid)), max=1.0 - 1e-6
    )
    along = torch.bucketize(fractions, edges, right=True)
    return (along[:, None] * grid + along[None, :]).flatten()


SMOLVLM = picture_family(
    "smolvlm", "SmolVLM and SmolVLM2 (pictures)", "SmolVLMForConditionalGeneration", read_with_clips
)
IDEFICS3 = picture_family("idefics3", "Idefics3 (pictures)", "Idefics3ForConditionalGeneration", read)
