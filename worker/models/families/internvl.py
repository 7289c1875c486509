"""Owns InternVL 3 and 3.5 in transformers' layout: its own vision transformer, joined patches, a Qwen or Llama. Decode thread."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.pictures import max_crops
from shared.protocol import ClipLayout, ClipSpec, ImageLayout, ImageSpec, OneCrop, RatioTiles
from worker.formats.json_files import read_object
from worker.formats.source import Source, Target
from worker.models.families.llama import read as read_llama
from worker.models.families.qwen import read_qwen2, read_qwen3
from worker.models.layers import Mlp, take_linear, take_norm
from worker.models.linear import PackedLinear, Take
from worker.models.picture_model import (
    PictureParts,
    Project,
    ReadText,
    picture_family,
    section,
    text_settings,
)
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
    TowerBlock,
    TowerConfig,
    is_exact_gelu,
    padded_linear,
    read_tower,
    take_patches,
    take_qkv,
    tokens_of,
    unshuffled,
)

_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_TEXTS: dict[str, tuple[ReadText, dict[str, Any]]] = {
    "qwen2": (read_qwen2, _QWEN),
    "qwen3": (read_qwen3, _QWEN),
    "llama": (read_llama, _LLAMA),
}
_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
_PROCESSOR: dict[str, Any] = {
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_patches": 1,
    "max_patches": 12,
}
_CLIP: dict[str, Any] = {name: value for name, value in _PROCESSOR.items() if "patches" not in name}
_JOIN_EPS = 1e-5  # of the projector's norm, which no setting names


def rename(stored: str) -> Target | None:
    """The decoder's tensors under its own names, from the older spelling and from transformers' newer one."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", stored)
    name = name.replace("model.lm_head.", "lm_head.")
    name = re.sub(r"^(model\.)?(vision_tower|multi_modal_projector)\.", r"\2.", name)
    return None if name == "vision_tower.embeddings.mask_token" else Target(name)


def read(settings: Settings, source: Source) -> PictureParts:
    """See `PictureParts`. Raises CheckpointError."""
    named = str(settings.objects("text_config").get("model_type", "qwen2"))
    if named not in _TEXTS:
        raise settings.fault(f"'text_config.model_type' is {named!r}; supported are {', '.join(_TEXTS)}")
    read_text, defaults = _TEXTS[named]
    text = text_settings(settings, defaults)
    processor = read_preprocessor(source, _PROCESSOR)
    vision = section(settings, "vision_config", _VISION)
    _check(settings, vision)
    tower = read_tower(vision, processor.mean, processor.std)
    processor.check_side("size", tower.crop_size)
    factor = round(1 / settings.above_0("downsample_ratio", 0.5))
    spec = ImageSpec(
        tower.crop_size,
        tokens_of(settings, tower, factor),
        _rule(processor),
        processor.resample,
        _layout(source),
        max_images=MAX_IMAGES,
        clip=clip_or_none(partial(_clip, source, processor, tower.crop_size)),
    )
    sizes = read_text(text)
    build = partial(_build, settings, vision, tower, factor, sizes.dim, max_crops(spec))
    return PictureParts(text, sizes, spec, rename, build)


def _check(settings: Settings, vision: Settings) -> None:
    wanted = (
        (vision, "norm_type", "layer_norm"),
        (vision, "use_qk_norm", False),
        (vision, "use_absolute_position_embeddings", True),
        (settings, "vision_feature_layer", -1),
        (settings, "vision_feature_select_strategy", "default"),
    )
    for where, name, value in wanted:
        if where.get(name, value) != value:
            raise where.fault(f"{name!r} is {where.get(name)!r}; supported is {value!r}")


def _rule(processor: Preprocessor) -> OneCrop | RatioTiles:
    """Its processor tiles whatever the folder's `crop_to_patches` says, which is about a picture by itself."""
    least, most = processor.settings.size("min_patches"), processor.settings.size("max_patches")
    if least > most:
        raise processor.settings.fault("'min_patches' is above 'max_patches'")
    return OneCrop() if most == 1 else RatioTiles(least, most)


def _layout(source: Source) -> ImageLayout:
    named = read_object(source.path / "tokenizer_config.json")
    begin = str(named.get("start_image_token") or "<img>")
    end = str(named.get("end_image_token") or "</img>")
    run = str(named.get("context_image_token") or "<IMG_CONTEXT>")
    return ImageLayout(
        placeholder=run,
        run=run,
        whole=begin + run + end,
        before=begin,
        tile=run,
        overview=run,
        after=end,
    )


def _clip(source: Source, pictures: Preprocessor, crop_size: int) -> ClipSpec:
    """Frames are not tiled, and no times are written."""
    processor = read_clip_preprocessor(source, pictures, _CLIP)
    processor.check_side("size", crop_size)
    named = read_object(source.path / "tokenizer_config.json")
    layout = ClipLayout(
        placeholder=str(named.get("video_token") or "<video>"),
        frame="Frame{number}: " + _layout(source).whole,
        gap="\n",
    )
    return ClipSpec(OneCrop(), processor.resample, layout, max_frames=MAX_FRAMES, fps=1.0)


def _build(
    settings: Settings, vision: Settings, config: TowerConfig, factor: int, dim: int, most: int, take: Take
) -> tuple[Tower, Project]:
    name = "vision_tower"
    biased = vision.flag("attention_bias")
    layers = (f"{name}.encoder.layer.{index}" for index in range(config.num_layers))
    tower = Tower(
        config,
        most,
        take_patches(take, f"{name}.embeddings.patch_embeddings.projection", config),
        take(f"{name}.embeddings.position_embeddings", 1, config.num_patches + 1, config.dim),
        [_block(take, layer, config, biased=biased) for layer in layers],
        None
        if vision.flag("use_mean_pooling")
        else take_norm(take, f"{name}.layernorm", config.dim, config.eps),
        take(f"{name}.embeddings.cls_token", 1, 1, config.dim),
    )
    joined, projector = config.dim * factor * factor, "multi_modal_projector"
    norm = take_norm(take, f"{projector}.layer_norm", joined, _JOIN_EPS)
    first = take_linear(take, f"{projector}.linear_1", joined, dim)
    second = take_linear(take, f"{projector}.linear_2", dim, dim)
    approximate = "none" if is_exact_gelu(settings, "projector_hidden_act") else "tanh"

    def project(features: Tensor) -> Tensor:
        inner = first(norm(unshuffled(features, factor)))
        return second(F.gelu(inner, approximate=approximate))

    return tower, project


def _block(take: Take, name: str, config: TowerConfig, *, biased: bool) -> TowerBlock:
    dim, inner = config.dim, config.ff_dim
    return TowerBlock(
        take_norm(take, f"{name}.layernorm_before", dim, config.eps),
        take_qkv(take, f"{name}.attention", config, biased=biased),
        padded_linear(
            *_scaled(take, f"{name}.attention.projection_layer", f"{name}.lambda_1", dim, dim), config
        ),
        take_norm(take, f"{name}.layernorm_after", dim, config.eps),
        Mlp(
            take_linear(take, f"{name}.mlp.fc1", dim, inner),
            PackedLinear(*_scaled(take, f"{name}.mlp.fc2", f"{name}.lambda_2", inner, dim)),
        ),
        config.num_heads,
        exact_gelu=config.exact_gelu,
    )


def _scaled(take: Take, name: str, scale: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a product whose outputs are multiplied by learned factors: those go into its weights, before they are rounded."""
    factors = take(scale, outputs, dtype=torch.float32)
    weight = take(f"{name}.weight", outputs, inputs)
    bias = take(f"{name}.bias", outputs)
    scaled = (weight.float() * factors[:, None]).to(weight.dtype)
    return scaled, (bias.float() * factors).to(bias.dtype)


INTERNVL = picture_family(
    "internvl", "InternVL 3 and 3.5 (pictures; the -hf folders)", "InternVLForConditionalGeneration", read
)
