"""Owns rotary position tables: what config.json says of them, and the rotations made of it. Decode thread."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worker.models.settings import Settings

KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Frequencies of the rotation. `kind` is one of `KINDS`, or "none" for layers that do not rotate; the other fields
    are settings of the kinds."""

    theta: float = 10000.0
    kind: str = "default"
    fraction: float = 1.0  # share of a head's dimensions that are rotated, the first ones
    factor: float = 1.0
    original_tokens: int = 8192
    attention_factor: float = 1.0  # multiplies cosine and sine
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def parse_rope(
    config: Settings,
    *,
    theta: float = 10000.0,
    fraction: float = 1.0,
    layer_type: str | None = None,
    aliases: dict[str, str] | None = None,
) -> RopeConfig:
    """The rotary settings of a config.json, in the older layout (`rope_theta` and `rope_scaling`) or the newer
    (`rope_parameters`). `theta` and `fraction` are the family's defaults; `layer_type` picks one of the objects of a
    newer layout that has one for each type of layer; `aliases` are the family's other names of kinds.

    Raises CheckpointError for kinds not built here.
    """
    found = config.objects("rope_parameters") or config.objects("rope_scaling")
    if layer_type is not None and isinstance(found.get(layer_type), dict):
        found = found[layer_type]
    settings = Settings(found, config.file)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if isinstance(kind, str):
        kind = (aliases or {}).get(kind, kind)
    if kind not in KINDS:
        raise config.fault(
            f"rotary embedding of type {kind!r} is not supported, only {', '.join(KINDS[:-1])} and {KINDS[-1]}"
        )
    turned = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", fraction))
    if isinstance(turned, bool) or not isinstance(turned, int | float) or not 0 < turned <= 1:
        raise config.fault(f"'partial_rotary_factor' is {turned!r}; it lies above 0 and up to 1")
    theta = settings.above_0("rope_theta", config.above_0("rope_theta", theta))
    given: dict[str, Any] = {}
    if kind in ("llama3", "yarn", "longrope"):
        given["original_tokens"] = _original_tokens(config, settings)
    if kind in ("linear", "llama3"):
        given["factor"] = settings.above_0("factor")
    if kind == "llama3":
        low, high = settings.above_0("low_freq_factor"), settings.above_0("high_freq_factor")
        if low >= high:
            raise config.fault("low_freq_factor must be below high_freq_factor")
        given |= {"low_freq_factor": low, "high_freq_factor": high}
    if kind in ("yarn", "longrope"):
        stretched = config.size("max_position_embeddings") / given["original_tokens"]
        given["factor"] = settings.above_0("factor", stretched)
    if kind == "yarn":
        given |= {
            "beta_fast": settings.above_0("beta_fast", 32.0),
            "beta_slow": settings.above_0("beta_slow", 1.0),
            "truncate": settings.flag("truncate", True),
            "attention_factor": settings.above_0(
                "attention_factor", _yarn_attention(settings, given["factor"])
            ),
        }
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            given[name] = _factors(settings, name)
        usual = 1.0
        if given["factor"] > 1:
            usual = math.sqrt(1 + math.log(given["factor"]) / math.log(given["original_tokens"]))
        given["attention_factor"] = settings.above_0("attention_factor", usual)
    return RopeConfig(theta, kind, float(turned), **given)


def _original_tokens(config: Settings, settings: Settings) -> int:
    """The context that a model was first trained for. A value beside the rotary settings, as Phi-3 has it, comes first."""
    if config.get("original_max_position_embeddings") is not None:
        return config.size("original_max_position_embeddings")
    value = settings.get("original_max_position_embeddings")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return Settings({"original_max_position_embeddings": value}, config.file).size(
        "original_max_position_embeddings", config.size("max_position_embeddings")
    )


def _yarn_attention(settings: Settings, factor: float) -> float:
    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    one, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
    if one and all_dims:
        return scale(settings.above_0("mscale")) / scale(settings.above_0("mscale_all_dim"))
    return scale(1.0)


def _factors(settings: Settings, name: str) -> tuple[float, ...]:
    value = settings.get(name)
    if not isinstance(value, list) or not all(
        isinstance(f, int | float) and 0 < f <= sys.float_info.max for f in value
    ):
        raise settings.fault(f"rotary setting {name!r} is missing or not a list of numbers above 0")
    return tuple(float(f) for f in value)


def most_context(rope: RopeConfig, max_positions: int) -> int:
    """Positions that these rotations hold for, in a model whose config.json names `max_positions`."""
    if rope.kind == "yarn":
        return max(max_positions, int(rope.factor * rope.original_tokens))
    return max_positions


def usual_context(rope: RopeConfig, max_positions: int) -> int:
    """The context served unless the settings ask for more. With longrope it is the one that the short factors are for,
    because the long factors would change the answers to short prompts as well."""
    return min(max_positions, rope.original_tokens) if rope.kind == "longrope" else max_positions


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, context_tokens: int) -> Tensor:
    """(rotary_dim / 2,) fp32: radians a position turns each pair by.

    `dynamic` equals the default kind within the context that config.json names, and no longer context is served.
    `longrope` has one set of factors for contexts up to the original one, and another for longer contexts; the served
    context chooses one for all prompts.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    if rope.kind == "none":
        return torch.zeros_like(exponents)
    periods = rope.theta**exponents
    inverse = 1.0 / periods
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        # Slow rotations are stretched by `factor`, quick ones kept, and those between are blended.
        turns = rope.original_tokens * inverse / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return inverse * ((1 - kept) / rope.factor + kept)
    if rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope, rotary_dim)
        return 1.0 / (rope.factor * periods) * (1 - kept) + inverse * kept
    if rope.kind == "longrope":
        factors = rope.long_factor if context_tokens > rope.original_tokens else rope.short_factor
        return 1.0 / (torch.tensor(factors) * periods)
    return inverse


def _yarn_ramp(rope: RopeConfig, rotary_dim: int) -> Tensor:
    """(rotary_dim / 2,) from 0, turned as before, to 1, stretched by `factor` (Peng et al. 2023)."""

    def pair(turns: float) -> float:
        """The pair that makes `turns` turns within the original context."""
        return (
            rotary_dim * math.log(rope.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)


def rotation_table(
    rope: RopeConfig, rotary_dim: int, context_tokens: int, device: torch.device, magnitude: float = 1.0
) -> Tensor:
    """(context_tokens, 1, rotary_dim / 2) complex64 rotations, one row a position, broadcast over heads; of the kind
    none a single row. `magnitude` is what their length is multiplied by: q and k are, and scores by its square."""
    num_rows = 1 if rope.kind == "none" else context_tokens
    inverse = inverse_frequencies(rope, rotary_dim, context_tokens)
    angles = torch.arange(num_rows, dtype=torch.float32)[:, None] * inverse
    lengths = torch.full_like(angles, magnitude * rope.attention_factor)
    return torch.polar(lengths, angles).unsqueeze(1).to(device)


def pair_order(head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """(head_dim,) int64: a head's dimensions so that the two of each rotated pair, stored half of `rotary_dim` apart,
    lie side by side; those that are not rotated stay behind them. q and k are permuted alike, which leaves their
    products as they were, and a pair becomes one complex number: the rotation of all heads is a single product."""
    turned = head_dim if rotary_dim is None else rotary_dim
    pairs = torch.arange(turned).view(2, turned // 2).t().reshape(-1)
    return torch.cat([pairs, torch.arange(turned, head_dim)])
