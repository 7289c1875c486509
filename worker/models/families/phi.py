"""Owns Phi-3 and Phi-4-mini: stored with q, k and v as one tensor, and gate and up; heads partly rotated. Decode thread."""

from __future__ import annotations

from worker.models.dense_config import DenseConfig, read_dense, sliding_layers
from worker.models.family import dense_family
from worker.models.rope import parse_rope
from worker.models.settings import Settings


def read(settings: Settings) -> DenseConfig:
    """What older folders call "su" or "yarn" is longrope."""
    windowed = settings.get("sliding_window") is not None
    return read_dense(
        settings,
        eps=("rms_norm_eps", 1e-5),
        ropes=(parse_rope(settings, aliases={"su": "longrope", "yarn": "longrope"}),),
        layers=sliding_layers(settings, lambda _: windowed),
        mlp_bias=False,
        fused_projections=True,
    )


PHI3 = dense_family("phi3", "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini", "Phi3ForCausalLM", read)
