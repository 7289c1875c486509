"""Owns rotary position tables: what config.json says of them, and the rotations made of it. Decode thread."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worker.formats.source import CheckpointError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Frequencies of the rotation. `kind` is default, linear or llama3; the rest of a kind's settings follow."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_tokens: int = 8192


def parse_rope(config: dict[str, Any], file: Path) -> RopeConfig:
    """Read the rotary settings of a Hugging Face config.json, in the older layout (`rope_theta` and
    `rope_scaling`) or the newer (`rope_parameters`). Raises CheckpointError for kinds not built here."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise CheckpointError("the rotary settings are not an object", file=file)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"rotary embedding of type {kind!r} is not supported, only default, linear and llama3", file=file
        )
    if settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError("partly rotated heads (partial_rotary_factor) are not supported", file=file)

    def number(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"rotary setting {name!r} is missing or not above 0: {value!r}", file=file)
        return float(value)

    theta = number("rope_theta", settings.get("rope_theta", config.get("rope_theta", 10000.0)))
    if kind == "default":
        return RopeConfig(theta)
    factor = number("factor", settings.get("factor"))
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    low, high, original = (
        number(name, settings.get(name))
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if low >= high:
        raise CheckpointError("low_freq_factor must be below high_freq_factor", file=file)
    return RopeConfig(theta, kind, factor, low, high, int(original))


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """(head_dim / 2,) fp32: radians a position turns each pair by."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        # Slow rotations are stretched by `factor`, quick ones kept, and those between are blended.
        turns = rope.original_tokens * inverse / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return inverse * ((1 - kept) / rope.factor + kept)
    return inverse


def rotation_table(rope: RopeConfig, head_dim: int, max_context: int, device: torch.device) -> Tensor:
    """(max_context, 1, head_dim / 2) complex64 rotations, one row a position, broadcast over heads."""
    angles = torch.arange(max_context, dtype=torch.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1).to(device)


def pair_order(head_dim: int) -> Tensor:
    """(head_dim,) int64: a head's dimensions so that the two of each rotated pair, stored half a head apart, lie
    side by side. q and k are permuted alike, which leaves their products as they were, and a pair becomes one
    complex number: the rotation of all heads is then a single product."""
    return torch.arange(head_dim).view(2, head_dim // 2).t().reshape(-1)
