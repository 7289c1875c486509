"""Owns what config.json says of a Moondream checkpoint, of the second or the third generation. Decode thread.

A released config.json names only what differs from the sizes below, often nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from worker.formats.source import CheckpointError

_Section = TypeVar("_Section")


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The routed experts of the layers from `start_layer` on."""

    num_experts: int = 64
    start_layer: int = 4
    experts_per_token: int = 8
    expert_inner_dim: int = 1024


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Sizes of the language model."""

    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    vocab_size: int = 51200
    max_context: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 32
    prefix_attn: int | None = None  # None: BOS and the image
    rope_theta: float = 10000.0
    tau_attn: bool = False  # whether q and v are scaled by content and position
    moe: ExpertsConfig | None = None

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_heads

    @property
    def qkv_dim(self) -> int:
        """Width of the fused projection: all query heads, then key heads, then value heads."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Sizes of the vision encoder, and how pictures are cut for it."""

    enc_dim: int = 1152
    enc_patch_size: int = 14
    enc_n_layers: int = 27
    enc_ff_dim: int = 4304
    enc_n_heads: int = 16
    proj_out_dim: int = 2048
    proj_inner_dim: int = 8192
    crop_size: int = 378
    in_channels: int = 3
    max_crops: int = 12
    overlap_margin: int = 4  # patches

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.crop_size // self.enc_patch_size

    @property
    def num_tokens(self) -> int:
        """Input embeddings of one picture, whatever its size."""
        return self.grid * self.grid


@dataclass(frozen=True, slots=True)
class RegionConfig:
    """Sizes of the coordinate and size encoders and decoders."""

    dim: int = 2048
    coord_feat_dim: int = 256
    coord_out_dim: int = 1024
    size_feat_dim: int = 512
    size_out_dim: int = 2048
    inner_dim: int = 8192
    decoder_arch: str = "mlp"  # or linear, which has no inner_dim
    use_ln: bool = False  # whether hidden states are normalised before they are decoded


def _released_templates() -> dict[str, Any]:
    return {
        "caption": {
            "short": [1, 32708, 2, 12492, 3],
            "normal": [1, 32708, 2, 6382, 3],
            "long": [1, 32708, 2, 4059, 3],
        },
        "query": {"prefix": [1, 15381, 2], "suffix": [3]},
        "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
        "point": {"prefix": [1, 2581, 2], "suffix": [3]},
    }


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Special ids and the fixed parts of each task's prompt."""

    bos_id: int = 0
    eos_id: int = 0
    answer_id: int = 3
    thinking_id: int = 4
    coord_id: int = 5
    size_id: int = 6
    start_ground_points_id: int = 7
    end_ground_id: int = 9
    templates: dict[str, Any] = field(default_factory=_released_templates)


@dataclass(frozen=True, slots=True)
class MoondreamConfig:
    """All of a checkpoint's sizes. `parse_config` makes and checks it."""

    text: TextConfig
    vision: VisionConfig
    region: RegionConfig
    tokenizer: TokenizerConfig

    @property
    def prefix_tokens(self) -> int:
        """Leading positions of a prompt with a picture that attend to each other both ways."""
        if self.text.prefix_attn is not None:
            return self.text.prefix_attn
        return 1 + self.vision.num_tokens


_SECTIONS = ("text", "vision", "region", "tokenizer")
_THIRD: dict[str, dict[str, Any]] = {
    "text": {"max_context": 32768, "rope_theta": 1.5e6, "tau_attn": True, "moe": {}},
    "region": {"decoder_arch": "linear", "use_ln": True},
    "tokenizer": {
        "templates": {**_released_templates(), "segment": {"prefix": [1, 17374, 2], "suffix": [3]}}
    },
}
"""In which the third generation differs from the sizes above."""


def parse_config(config: dict[str, Any], file: Path, *, third: bool | None = None) -> MoondreamConfig:
    """Read the sizes out of a config.json, which errors name as `file`. `third`: whether the weights are of Moondream 3; None:
    as config.json says, see `says_third`.

    Raises CheckpointError on unknown keys (a model this code would run wrongly) and on impossible sizes.
    """
    sections = config.get("config")
    if sections is None:
        sections = {name: config[name] for name in _SECTIONS if name in config}
    if not isinstance(sections, dict):
        raise CheckpointError("'config' is not an object", file=file)
    unknown = sorted(set(sections) - {*_SECTIONS, "skills"})
    if unknown:
        raise CheckpointError(f"unknown section {unknown[0]!r} in 'config'", file=file)
    usual = _THIRD if (says_third(config) if third is None else third) else {}
    text, vision, region, tokenizer = (_values(sections, name, usual, file) for name in _SECTIONS)
    moe = text.pop("moe", None)
    if moe is not None:
        text["moe"] = _section(ExpertsConfig, moe, "text.moe", file)
    parsed = MoondreamConfig(
        text=_section(TextConfig, text, "text", file),
        vision=_section(VisionConfig, vision, "vision", file),
        region=_section(RegionConfig, region, "region", file),
        tokenizer=_section(TokenizerConfig, tokenizer, "tokenizer", file),
    )
    _check(parsed, file)
    return parsed


def says_third(config: dict[str, Any]) -> bool:
    """Whether a config.json says that it is Moondream 3: by its names, or by experts among its sizes."""
    named = config.get("architectures")
    names = [*(named if isinstance(named, list) else []), config.get("model_type")]
    sections = config.get("config") or config
    text = sections.get("text") if isinstance(sections, dict) else None
    has_experts = isinstance(text, dict) and text.get("moe") is not None
    return has_experts or any("moondream3" in str(name).lower() for name in names)


def _values(sections: dict[str, Any], name: str, usual: dict[str, Any], file: Path) -> dict[str, Any]:
    """What a section says, over the generation's usual."""
    values = sections.get(name) or {}
    if not isinstance(values, dict):
        raise CheckpointError(f"'{name}' is not an object", file=file)
    # Written as null by some releases: features this checkpoint does not use.
    given = {key: value for key, value in values.items() if value is not None}
    if "group_size" in given:
        raise CheckpointError(f"'{name}.group_size': quantised weights are not supported", file=file)
    merged: dict[str, Any] = usual.get(name, {}) | given
    return merged


def _section(kind: type[_Section], values: object, name: str, file: Path) -> _Section:
    if not isinstance(values, dict):
        raise CheckpointError(f"'{name}' is not an object", file=file)
    known = {entry.name: entry.type for entry in fields(kind)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise CheckpointError(f"unknown setting '{name}.{key}'", file=file)
        if key in ("templates", "moe"):
            continue
        if known[key] == "bool":
            fits, expected = isinstance(value, bool), "true or false"
        elif known[key] == "str":
            fits, expected = isinstance(value, str), "text"
        elif known[key] == "float":
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            expected = "a number above 0"
        else:
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            expected = "a whole number of at least 0"
        if not fits:
            raise CheckpointError(f"'{name}.{key}' is {value!r}, not {expected}", file=file)
    return kind(**values)


def _check(config: MoondreamConfig, file: Path) -> None:
    text, vision, region = config.text, config.vision, config.region
    rules = [
        (
            min(text.dim, text.n_layers, text.n_heads, text.n_kv_heads, vision.crop_size, vision.enc_n_heads)
            > 0
            and vision.enc_patch_size > 0,
            "sizes must be at least 1",
        ),
        (vision.in_channels == 3, "pictures have 3 channels"),
        (text.dim % max(1, text.n_heads) == 0, "text.dim must divide into text.n_heads"),
        (text.n_heads % max(1, text.n_kv_heads) == 0, "text.n_heads must divide into text.n_kv_heads"),
        (text.dim // max(1, text.n_heads) % 4 == 0, "text.dim / text.n_heads must be a multiple of 4"),
        (vision.enc_dim % max(1, vision.enc_n_heads) == 0, "vision.enc_dim must divide into enc_n_heads"),
        (vision.crop_size % max(1, vision.enc_patch_size) == 0, "crop_size must be whole patches"),
        (
            2 * vision.overlap_margin * vision.enc_patch_size < vision.crop_size,
            "overlap_margin leaves nothing of a crop",
        ),
        (vision.proj_out_dim == text.dim == region.dim, "text.dim, proj_out_dim and region.dim must agree"),
        (region.coord_feat_dim % 2 == 0 == region.size_feat_dim % 2, "feature widths must be even"),
        (region.size_out_dim % 2 == 0, "size_out_dim must be even: width's bins, then height's"),
        (config.prefix_tokens < text.max_context, "max_context has no room for a picture"),
        (
            region.decoder_arch in ("mlp", "linear"),
            f"region.decoder_arch {region.decoder_arch!r} is not known",
        ),
        (text.tau_attn == (text.moe is not None), "tau_attn and moe come together, in Moondream 3"),
        (
            text.moe is None or text.n_kv_heads == text.n_heads,
            "Moondream 3 has as many n_kv_heads as n_heads",
        ),
        (
            text.moe is None
            or (
                0 < text.moe.experts_per_token <= text.moe.num_experts
                and text.moe.expert_inner_dim > 0
                and text.moe.start_layer < text.n_layers
            ),
            "text.moe: experts_per_token and start_layer lie below num_experts and n_layers",
        ),
    ]
    for holds, problem in rules:
        if not holds:
            raise CheckpointError(problem, file=file)
