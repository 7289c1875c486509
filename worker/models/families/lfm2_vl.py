"""Owns LFM2-VL: SigLIP 2 over crops of their own proportions, squares of patches joined, two products, LFM2. Decode thread."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from shared.pictures import max_crops
from shared.protocol import FreeTiles, ImageLayout, ImageSpec
from worker.formats.source import Source, Target
from worker.models.families import lfm2
from worker.models.flex_tower import FlexTower
from worker.models.layers import Mlp, take_linear, take_norm
from worker.models.linear import PackedLinear, Take
from worker.models.picture_model import PictureParts, Project, picture_family, section, text_settings
from worker.models.picture_plan import MAX_IMAGES, Preprocessor, read_preprocessor
from worker.models.settings import Settings
from worker.models.vision_tower import (
    TowerBlock,
    TowerConfig,
    is_exact_gelu,
    padded_linear,
    read_tower,
    square,
    take_qkv,
)

# What the classes of transformers have where a folder says nothing.
_TEXT: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
}
_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "num_patches": 256,
    "hidden_act": "gelu_pytorch_tanh",
}
_PROCESSOR: dict[str, Any] = {
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "downsample_factor": 2,
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "encoder_patch_size": 16,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
}
_RUN = "<image>"
LAYOUT = ImageLayout(
    placeholder=_RUN,
    run=_RUN,
    whole=f"<|image_start|>{_RUN}<|image_end|>",
    before="<|image_start|>",
    tile="<|img_row_{row}_col_{col}|>" + _RUN,
    overview=f"<|img_thumbnail|>{_RUN}",
    after="<|image_end|>",
)


def rename(stored: str) -> Target | None:
    """The decoder's tensors under its own names, the others without the first `model.`; none of the pooling head, whose
    output nobody reads."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", stored)
    name = name.replace("model.lm_head.", "lm_head.")
    name = re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", "vision.", name)
    if name.startswith("vision.head."):
        return None
    name = re.sub(r"^model\.multi_modal_projector\.", "multi_modal_projector.", name)
    return lfm2.rename(name) if name.startswith("model.") else Target(name)


def read(settings: Settings, source: Source) -> PictureParts:
    """See `PictureParts`. Raises CheckpointError."""
    text = text_settings(settings, _TEXT)
    if text.get("model_type", "lfm2") != "lfm2":
        raise text.fault(f"'text_config.model_type' is {text.get('model_type')!r}; supported is lfm2")
    tied = settings.flag("tie_embedding", settings.flag("tie_word_embeddings", True))
    untangled = {k: v for k, v in text.values.items() if k != "tie_embedding"}
    text = Settings({**untangled, "tie_word_embeddings": tied}, text.file)
    sizes = lfm2.read(text)
    if settings.get("vision_feature_layer", -1) != -1:
        raise settings.fault(
            f"'vision_feature_layer' is {settings.get('vision_feature_layer')!r}; supported is -1, the last"
        )
    vision = section(settings, "vision_config", _VISION)
    processor = read_preprocessor(source, _PROCESSOR)
    tower = _tower(vision, processor)
    merge = settings.size("downsample_factor", 2)
    for name, wanted in (("encoder_patch_size", tower.patch_size), ("downsample_factor", merge)):
        if processor.settings.size(name) != wanted:
            found = processor.settings.size(name)
            raise processor.settings.fault(f"{name!r} is {found}, and config.json's model has {wanted}")
    spec = _spec(processor, tower.patch_size, merge)
    build = partial(_build, settings, tower, merge, sizes.dim, max_crops(spec))
    return PictureParts(text, sizes, spec, rename, build)


def _tower(vision: Settings, processor: Preprocessor) -> TowerConfig:
    side = math.isqrt(vision.size("num_patches"))
    if side * side != vision.size("num_patches"):
        raise vision.fault(f"'num_patches' is {vision.size('num_patches')}; a square is expected")
    given = {**vision.values, "image_size": side * square(vision, "patch_size")}
    return read_tower(Settings(given, vision.file), processor.mean, processor.std)


def _spec(processor: Preprocessor, patch: int, merge: int) -> ImageSpec:
    said, unit = processor.settings, patch * merge
    tile = said.size("tile_size")
    if tile % unit:
        raise said.fault(f"'tile_size' is {tile}; whole squares of {unit} pixels are expected")
    least, most = said.size("min_image_tokens"), said.size("max_image_tokens")
    if least > most:
        raise said.fault("'min_image_tokens' is above 'max_image_tokens'")
    min_tiles, max_tiles = said.size("min_tiles"), said.size("max_tiles")
    if min_tiles > max_tiles:
        raise said.fault("'min_tiles' is above 'max_tiles'")
    if not said.flag("do_image_splitting"):
        min_tiles = max_tiles = 1
    elif max_tiles > 1 and min_tiles < 2:
        raise said.fault("'min_tiles' is 1; a picture that is cut has at least 2 tiles here")
    rule = FreeTiles(
        unit,
        least * unit**2,
        most * unit**2,
        int(most * unit**2 * said.above_0("max_pixels_tolerance")),
        patch,
        min_tiles,
        max_tiles,
        said.flag("use_thumbnail"),
    )
    layout = LAYOUT if rule.shows_whole else ImageLayout(**(_fields(LAYOUT) | {"overview": ""}))
    return ImageSpec(tile, (tile // unit) ** 2, rule, processor.resample, layout, max_images=MAX_IMAGES)


def _fields(layout: ImageLayout) -> dict[str, str]:
    return {name: getattr(layout, name) for name in layout.__struct_fields__}


def _build(
    settings: Settings, config: TowerConfig, merge: int, dim: int, most: int, take: Take
) -> tuple[FlexTower, Project]:
    area = config.patch_size**2 * 3
    table = take("vision.embeddings.position_embedding.weight", config.num_patches, config.dim)
    tower = FlexTower(
        config,
        most,
        take_linear(take, "vision.embeddings.patch_embedding", area, config.dim),
        table.view(config.grid, config.grid, -1),
        [_block(take, f"vision.encoder.layers.{index}", config) for index in range(config.num_layers)],
        take_norm(take, "vision.post_layernorm", config.dim, config.eps),
        merge,
    )
    return tower, _projector(settings, config.dim * merge * merge, dim, take)


def _block(take: Take, name: str, config: TowerConfig) -> TowerBlock:
    dim, attention = config.dim, f"{name}.self_attn"
    out = take(f"{attention}.out_proj.weight", dim, dim), take(f"{attention}.out_proj.bias", dim)
    return TowerBlock(
        take_norm(take, f"{name}.layer_norm1", dim, config.eps),
        take_qkv(take, attention, config),
        padded_linear(*out, config),
        take_norm(take, f"{name}.layer_norm2", dim, config.eps),
        Mlp(
            take_linear(take, f"{name}.mlp.fc1", dim, config.ff_dim),
            take_linear(take, f"{name}.mlp.fc2", config.ff_dim, dim),
        ),
        config.num_heads,
        exact_gelu=config.exact_gelu,
    )


def _projector(settings: Settings, inputs: int, dim: int, take: Take) -> Project:
    name, inner = "multi_modal_projector", settings.size("projector_hidden_size", 2560)
    norm = (
        take_norm(take, f"{name}.layer_norm", inputs)
        if settings.flag("projector_use_layernorm", True)
        else None
    )
    named = Settings({"projector_hidden_act": settings.get("projector_hidden_act", "gelu")}, settings.file)
    is_exact = is_exact_gelu(named, "projector_hidden_act")

    def product(part: str, inputs: int, outputs: int) -> PackedLinear:
        if settings.flag("projector_bias", True):
            return take_linear(take, f"{name}.{part}", inputs, outputs)
        return PackedLinear(take(f"{name}.{part}.weight", outputs, inputs))

    first, second = product("linear_1", inputs, inner), product("linear_2", inner, dim)

    def project(features: Tensor) -> Tensor:
        normed = features if norm is None else norm(features)
        return second(F.gelu(first(normed)) if is_exact else first.gelu(normed))

    return project


LFM2_VL = picture_family(
    "lfm2_vl", "LFM2-VL 450M, 1.6B and 3B (pictures)", "Lfm2VlForConditionalGeneration", read
)
