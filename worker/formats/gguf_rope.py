"""Owns what a GGUF file says of rotary positions, as config.json's `rope_parameters`. Any thread.

llama.cpp keeps Llama 3's and Phi's stretched frequencies as a tensor of divisors, one a rotary pair; the rule that
made them is not in the file. Llama 3's rule is recognised by its divisors; any other list is passed on as it is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from worker.formats.gguf_settings import Settings
from worker.formats.gguf_values import small_values

# The one rule of the released Llamas (3.1, 3.2, 3.3), which differ only in its factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_parameters(settings: Settings, head_dim: int) -> dict[str, Any]:
    """`rope_theta`, `rope_type` and what the type needs. Raises CheckpointError for kinds nobody can map."""
    found: dict[str, Any] = {"rope_theta": settings.number("rope.freq_base", 10000.0), "rope_type": "default"}
    rotated = settings.count("rope.dimension_count", head_dim)
    if rotated != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    if settings.has("rope_freqs.weight"):
        divisors = small_values(settings.container, "rope_freqs.weight", rotated // 2)
        return found | _of_divisors(divisors, found["rope_theta"], rotated)
    if settings.has("rope_factors_long.weight") and settings.has("rope_factors_short.weight"):
        long, short = (
            small_values(settings.container, f"rope_factors_{part}.weight", rotated // 2).tolist()
            for part in ("long", "short")
        )
        found |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        attention_factor = settings.maybe_number("rope.scaling.attn_factor")
        original = settings.maybe_count("rope.scaling.original_context_length")
        if attention_factor is not None:
            found["attention_factor"] = attention_factor
        if original is not None:
            found["original_max_position_embeddings"] = original
        return found
    return found | _scaling(settings)


def _scaling(settings: Settings) -> dict[str, Any]:
    kind = settings.text("rope.scaling.type")
    if kind in ("", "none"):
        return {}
    factor = settings.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {}
    if kind == "yarn":
        found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        found["original_max_position_embeddings"] = settings.count("rope.scaling.original_context_length")
        for theirs, ours in (("attn_factor", "attention_factor"), ("yarn_beta_fast", "beta_fast")):
            value = settings.maybe_number(f"rope.scaling.{theirs}")
            if value is not None:
                found[ours] = value
        slow = settings.maybe_number("rope.scaling.yarn_beta_slow")
        return found if slow is None else found | {"beta_slow": slow}
    raise settings.error("rope.scaling.type", f"is {kind!r}; none, linear, yarn and longrope are read here")


def _of_divisors(divisors: np.ndarray, theta: float, rotated: int) -> dict[str, Any]:
    """The rule behind a list of divisors, one for each rotary pair."""
    if np.allclose(divisors, 1.0, rtol=1e-6):
        return {}
    factor = float(divisors.max())
    low, high, original = _LLAMA3.values()
    turns = original * theta ** -(np.arange(0, rotated, 2) / rotated) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if np.allclose(divisors, 1 / ((1 - kept) / factor + kept), rtol=1e-4):
        return {"rope_type": "llama3", "factor": factor} | _LLAMA3
    listed = divisors.tolist()
    return {
        "rope_type": "longrope",
        "long_factor": listed,
        "short_factor": listed,
        "attention_factor": 1.0,
    }
