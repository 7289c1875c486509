"""Owns Qwen3-VL (dense) and Qwen2.5-VL: pictures of any size, rotary positions of three axes, features behind several layers. Decode thread."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace

from shared.protocol import FreeSize, ImageLayout, ImageSpec
from worker.formats.source import Source, Target
from worker.models.dense_config import DenseConfig, described
from worker.models.families.qwen import read_qwen2, read_qwen3
from worker.models.families.qwen_vl_clips import check_patches, clip3, clip25
from worker.models.free_tower import (
    FreeBlock,
    FreeConfig,
    FreeTower,
    Merger,
    read_free_tower,
    take_frame_patches,
    take_rotated_qkv,
)
from worker.models.layers import GatedMlp, Mlp, RmsNorm, take_linear, take_norm
from worker.models.linear import PackedLinear, Take
from worker.models.picture_model import PictureParts, Project, picture_family, section, text_settings
from worker.models.picture_plan import MAX_IMAGES, Preprocessor, clip_or_none, read_preprocessor
from worker.models.rope import parse_rope
from worker.models.settings import Settings

# What the classes of transformers have where a folder says nothing.
_TEXT3: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
}
_TEXT25: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}
_VISION3: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_VISION25: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_PAD = "<|image_pad|>"
LAYOUT = ImageLayout(placeholder=_PAD, run=_PAD, whole=_PAD)  # its marks are the chat template's
MOST_TOKENS = 1280
"""Positions of a picture unless the folder asks for more. Released folders allow 16384: 65536 patches that all attend to each
other, which no step's time holds."""

_EPS = 1e-6  # of the towers' norms, which no setting names


def rename(stored: str) -> Target:
    """The decoder's tensors under its own names, from the hub's older spelling and from transformers' newer one."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", stored)
    name = name.replace("model.lm_head.", "lm_head.")
    return Target(re.sub(r"^model\.visual\.", "visual.", name))


def read3(settings: Settings, source: Source) -> PictureParts:
    """See `PictureParts`. Raises CheckpointError."""
    text = text_settings(settings, _TEXT3)
    rope = parse_rope(text, theta=500000.0, aliases={"mrope": "default"})
    sizes = read_qwen3(text, (rope,))
    vision = section(settings, "vision_config", _VISION3)
    if vision.get("hidden_act") != "gelu_pytorch_tanh":
        raise vision.fault(f"'hidden_act' is {vision.get('hidden_act')!r}; supported is gelu_pytorch_tanh")
    processor = read_preprocessor(source, _PROCESSOR)
    tower = read_free_tower(vision, processor.mean, processor.std)
    taps = _indexes(vision, "deepstack_visual_indexes", tower.num_layers)
    if len(taps) > sizes.num_layers:
        raise vision.fault("'deepstack_visual_indexes' has more entries than the decoder has layers")
    _check_width(vision, sizes)
    spec = _spec(settings, processor, tower, sizes)
    spec = replace(spec, clip=clip_or_none(partial(clip3, source, processor, tower, sizes, spec)))
    axes = _interleaved(_sections(text, [24, 20, 20], sizes), sizes.rotary_dim // 2)
    build = partial(_build3, vision, tower, taps, sizes.dim)
    return PictureParts(text, sizes, spec, rename, build, axes, len(taps))


def read25(settings: Settings, source: Source) -> PictureParts:
    """See `PictureParts`. Raises CheckpointError."""
    text = _text25(settings)
    rope = parse_rope(text, theta=1000000.0, aliases={"mrope": "default"})
    sizes = read_qwen2(text, (rope,))
    vision = section(settings, "vision_config", _VISION25)
    if vision.get("hidden_act") != "silu":
        raise vision.fault(f"'hidden_act' is {vision.get('hidden_act')!r}; supported is silu")
    processor = read_preprocessor(source, _PROCESSOR)
    tower = read_free_tower(vision, processor.mean, processor.std)
    window = vision.size("window_size") // tower.unit
    if not window:
        raise vision.fault(f"'window_size' is below {tower.unit} pixels, the side of a square of patches")
    full = frozenset(_indexes(vision, "fullatt_block_indexes", tower.num_layers, within=False))
    tower = read_free_tower(vision, processor.mean, processor.std, window=window, full=full)
    _check_width(vision, sizes)
    spec = _spec(settings, processor, tower, sizes)
    rate = vision.above_0("tokens_per_second", 4.0)
    spec = replace(spec, clip=clip_or_none(partial(clip25, source, processor, tower, sizes, spec, rate)))
    axes = tuple(
        number % 3 for number, size in enumerate(_sections(text, [16, 24, 24], sizes)) for _ in range(size)
    )
    return PictureParts(text, sizes, spec, rename, partial(_build25, tower, sizes.dim), axes)


def _text25(settings: Settings) -> Settings:
    """The decoder's settings, which the hub's older folders have at the top of config.json."""
    if settings.objects("text_config"):
        return text_settings(settings, _TEXT25)
    own = {key: value for key, value in settings.values.items() if key != "vision_config"}
    return text_settings(Settings({**settings.values, "text_config": own}, settings.file), _TEXT25)


def _check_width(vision: Settings, sizes: DenseConfig) -> None:
    if vision.size("out_hidden_size") != sizes.dim:
        raise vision.fault(
            f"'out_hidden_size' is {vision.size('out_hidden_size')}, and the decoder is {sizes.dim} wide"
        )


def _indexes(vision: Settings, name: str, num_layers: int, *, within: bool = True) -> list[int]:
    """Numbers of layers, in rising order; `within`: each is a layer that the tower has."""
    value = vision.get(name)
    is_list = isinstance(value, list | tuple) and all(type(one) is int and one >= 0 for one in value)
    if not is_list or (within and (sorted(set(value)) != list(value) or any(i >= num_layers for i in value))):
        raise vision.fault(f"{name!r} is {value!r}; layers of the tower are expected, in rising order")
    return list(value)


def _sections(text: Settings, default: list[int], sizes: DenseConfig) -> list[int]:
    """How many rotary pairs each axis has."""
    found = text.objects("rope_parameters") or text.objects("rope_scaling")
    value = found.get("mrope_section", default)
    is_list = isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
    if not is_list or len(value) != 3 or sum(value) != sizes.rotary_dim // 2:
        raise text.fault(
            f"'mrope_section' is {value!r}; three numbers are expected, {sizes.rotary_dim // 2} together"
        )
    return list(value)


def _interleaved(sections: Sequence[int], num_pairs: int) -> tuple[int, ...]:
    """Rows and columns take every third pair, as many as their sections have; time has all others."""
    axes = [0] * num_pairs
    for axis in (1, 2):
        for pair in range(axis, min(3 * sections[axis], num_pairs), 3):
            axes[pair] = axis
    return tuple(axes)


def _spec(settings: Settings, processor: Preprocessor, tower: FreeConfig, sizes: DenseConfig) -> ImageSpec:
    said = processor.settings
    check_patches(said, tower)
    size = Settings({**said.objects("size")}, said.file)
    least = said.size("min_pixels", size.size("shortest_edge", 56 * 56))
    most = said.size("max_pixels", size.size("longest_edge", 28 * 28 * 1280))
    asked = described(settings).get("max_pixels")
    if asked is None:
        most = min(most, min(MOST_TOKENS, max(1, sizes.context_tokens // 2)) * tower.unit**2)
    else:
        most = Settings({"max_pixels": asked}, settings.file).size("max_pixels")
    return ImageSpec(
        tower.unit,
        1,
        FreeSize(min(least, most), most),
        processor.resample,
        LAYOUT,
        max_images=MAX_IMAGES,
        position_axes=3,
    )


def _as_is(features: torch.Tensor) -> torch.Tensor:
    """The tower's mergers have projected them."""
    return features


def _blocks(
    config: FreeConfig, take: Take, block: Callable[[Take, str, FreeConfig], FreeBlock]
) -> list[FreeBlock]:
    return [block(take, f"visual.blocks.{index}", config) for index in range(config.num_layers)]


def _build3(
    vision: Settings, config: FreeConfig, taps: list[int], out: int, take: Take
) -> tuple[FreeTower, Project]:
    places = vision.size("num_position_embeddings")
    side = int(places**0.5)
    if side * side != places:
        raise vision.fault(f"'num_position_embeddings' is {places}; a square is expected")
    table = take("visual.pos_embed.weight", places, config.dim).view(side, side, -1)
    tower = FreeTower(
        config,
        table.dtype,
        take_frame_patches(take, "visual.patch_embed.proj", config, biased=True),
        _blocks(config, take, _block3),
        _merger3(take, "visual.merger", config, out),
        table,
        {
            layer: _merger3(take, f"visual.deepstack_merger_list.{number}", config, out, norms_joined=True)
            for number, layer in enumerate(taps)
        },
    )
    return tower, _as_is


def _block3(take: Take, name: str, config: FreeConfig) -> FreeBlock:
    return FreeBlock(
        take_norm(take, f"{name}.norm1", config.dim, _EPS),
        take_rotated_qkv(take, f"{name}.attn.qkv", config),
        take_linear(take, f"{name}.attn.proj", config.dim, config.dim),
        take_norm(take, f"{name}.norm2", config.dim, _EPS),
        Mlp(
            take_linear(take, f"{name}.mlp.linear_fc1", config.dim, config.ff_dim),
            take_linear(take, f"{name}.mlp.linear_fc2", config.ff_dim, config.dim),
        ),
    )


def _merger3(take: Take, name: str, config: FreeConfig, out: int, *, norms_joined: bool = False) -> Merger:
    squares = config.merge**2
    joined = config.dim * squares
    return Merger(
        take_norm(take, f"{name}.norm", joined if norms_joined else config.dim, _EPS),
        take_linear(take, f"{name}.linear_fc1", joined, joined),
        take_linear(take, f"{name}.linear_fc2", joined, out),
        squares,
        norms_joined,
    )


def _build25(config: FreeConfig, out: int, take: Take) -> tuple[FreeTower, Project]:
    squares = config.merge**2
    joined = config.dim * squares
    norm = take("visual.merger.ln_q.weight", config.dim)
    merger = Merger(
        RmsNorm(norm, _EPS),
        take_linear(take, "visual.merger.mlp.0", joined, joined),
        take_linear(take, "visual.merger.mlp.2", joined, out),
        squares,
    )
    patches = take_frame_patches(take, "visual.patch_embed.proj", config, biased=False)
    return FreeTower(config, norm.dtype, patches, _blocks(config, take, _block25), merger), _as_is


def _block25(take: Take, name: str, config: FreeConfig) -> FreeBlock:
    def stacked(kind: str, *inputs: int) -> torch.Tensor:
        return torch.cat(
            [take(f"{name}.mlp.{part}_proj.{kind}", config.ff_dim, *inputs) for part in ("gate", "up")]
        )

    return FreeBlock(
        RmsNorm(take(f"{name}.norm1.weight", config.dim), _EPS),
        take_rotated_qkv(take, f"{name}.attn.qkv", config),
        take_linear(take, f"{name}.attn.proj", config.dim, config.dim),
        RmsNorm(take(f"{name}.norm2.weight", config.dim), _EPS),
        GatedMlp(
            PackedLinear(stacked("weight", config.dim), stacked("bias"), gated=True),
            take_linear(take, f"{name}.mlp.down_proj", config.ff_dim, config.dim),
        ),
    )


QWEN3_VL = picture_family("qwen3_vl", "Qwen3-VL (dense; pictures)", "Qwen3VLForConditionalGeneration", read3)
QWEN25_VL = picture_family(
    "qwen2_5_vl", "Qwen2.5-VL (pictures)", "Qwen2_5_VLForConditionalGeneration", read25
)
