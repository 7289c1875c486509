"""Owns what config.json says of a Moondream 2 checkpoint, and the model card made of it. Decode thread.

A released config.json names only what differs from the sizes below, often nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from shared.protocol import ImageSpec, ModelCard, OverlappingTiles
from worker.formats.source import CheckpointError, Source
from worker.models.picture_plan import MAX_IMAGES

_Section = TypeVar("_Section")

LEAST_QUESTION = 32  # tokens of a question and its answer


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


def parse_config(config: dict[str, Any], file: Path) -> MoondreamConfig:
    """Read the sizes out of a config.json, which errors name as `file`.

    Raises CheckpointError on unknown keys (a model this code would run wrongly) and on impossible sizes.
    """
    sections = config.get("config", {})
    if not isinstance(sections, dict):
        raise CheckpointError("'config' is not an object", file=file)
    unknown = sorted(set(sections) - {"text", "vision", "region", "tokenizer"})
    if unknown:
        raise CheckpointError(f"unknown section {unknown[0]!r} in 'config'", file=file)
    parsed = MoondreamConfig(
        text=_section(TextConfig, sections, "text", file),
        vision=_section(VisionConfig, sections, "vision", file),
        region=_section(RegionConfig, sections, "region", file),
        tokenizer=_section(TokenizerConfig, sections, "tokenizer", file),
    )
    _check(parsed, file)
    return parsed


def _section(kind: type[_Section], sections: dict[str, Any], name: str, file: Path) -> _Section:
    values = sections.get(name) or {}
    if not isinstance(values, dict):
        raise CheckpointError(f"'{name}' is not an object", file=file)
    # Written as null by some releases: features this checkpoint does not use.
    values = {key: value for key, value in values.items() if value is not None}
    if "group_size" in values:
        raise CheckpointError(f"'{name}.group_size': quantised weights are not supported", file=file)
    if "moe" in values:
        raise CheckpointError(f"'{name}.moe': this is Moondream 3, which is not supported yet", file=file)
    known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckpointError(f"unknown setting '{name}.{unknown[0]}'", file=file)
    for key, value in values.items():
        if key != "templates" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise CheckpointError(f"'{name}.{key}' is not a whole number of at least 0", file=file)
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
    ]
    for holds, problem in rules:
        if not holds:
            raise CheckpointError(problem, file=file)


def make_card(config: MoondreamConfig, source: Source) -> ModelCard:
    """What gateways are told. The optional `degas` object of config.json names the model.

    Raises CheckpointError when a template is not a list of ids.
    """
    file = source.settings_file
    described = source.config.get("degas") or {}
    if not isinstance(described, dict):
        raise CheckpointError("'degas' is not an object", file=file)
    vision, ids = config.vision, config.tokenizer
    templates = _flatten_templates(ids, file)
    tasks = {
        "query": "query_prefix",
        "caption": "caption_normal",
        "detect": "detect_prefix",
        "point": "point_prefix",
    }
    capabilities = [task for task, key in tasks.items() if key in templates]
    return ModelCard(
        model_id=str(described.get("model_id") or source.model_id),
        family="moondream",
        context_tokens=config.text.max_context,
        vocab_size=config.text.vocab_size,
        bos_id=ids.bos_id,
        eos_ids=[ids.eos_id],
        created=source.created,
        image=ImageSpec(
            crop_size=vision.crop_size,
            crop_tokens=vision.num_tokens,
            rule=OverlappingTiles(vision.enc_patch_size, vision.overlap_margin, vision.max_crops),
            attends="prefix",
            max_images=max_images(config),
        ),
        capabilities=(["chat"] if "query" in capabilities else []) + capabilities,
        templates=templates,
        suppress_ids=[ids.answer_id],
        description=str(described.get("description") or ""),
        coord_id=ids.coord_id,
        size_id=ids.size_id,
    )


def max_images(config: MoondreamConfig) -> int:
    """How many pictures a conversation may have: as many as leave room for a question, at least one."""
    room = config.text.max_context - 1 - LEAST_QUESTION
    return max(1, min(MAX_IMAGES, room // config.vision.num_tokens))


def _flatten_templates(ids: TokenizerConfig, file: Path) -> dict[str, list[int]]:
    """The prompts' fixed parts as they follow BOS and the picture, by the names of `ModelCard.templates`.

    A question is followed by the query suffix, and an answer is opened by it once more; where the model is to
    reason first, the thinking id opens the reasoning, and the suffix the answer after it.
    """
    nested = ids.templates
    flat: dict[str, list[int]] = {}
    for task in ("caption", "query", "detect", "point"):
        for part, tokens in (nested.get(task) or {}).items():
            if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
                raise CheckpointError(f"template {task}.{part} is not a list of token ids", file=file)
            flat[f"{task}_{part}"] = list(tokens)
    if "query_suffix" in flat:
        suffix = flat["query_suffix"]
        flat["query_suffix"] = suffix + suffix
        flat["reasoning_suffix"] = [*suffix, ids.thinking_id]
        flat["reasoning_end"] = suffix
        flat["reasoning_suppress"] = [ids.eos_id, ids.size_id]
        flat["reasoning_close"] = [ids.answer_id]
        flat["reasoning_cuts"] = [ids.start_ground_points_id, ids.end_ground_id]
    return flat
