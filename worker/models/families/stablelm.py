"""Owns StableLM 2: LayerNorms, a quarter of each head rotated, in some sizes attention and MLP side by side. Decode thread."""

from __future__ import annotations

from worker.models.dense_config import DenseConfig, NormNames, QkNorm, read_dense
from worker.models.family import dense_family
from worker.models.rope import parse_rope
from worker.models.settings import Settings


def read(settings: Settings) -> DenseConfig:
    """In the 12B model each head of q and k has a LayerNorm, and one norm feeds attention and MLP."""
    parallel = settings.flag("use_parallel_residual")
    return read_dense(
        settings,
        eps=("layer_norm_eps", 1e-5),
        layer_norm=True,
        norms=NormNames(before_mlp=None) if parallel else NormNames(),
        parallel=parallel,
        ropes=(parse_rope(settings, fraction=0.25),),
        qkv_bias=settings.flag("use_qkv_bias"),
        qk_norm=QkNorm.LAYER if settings.flag("qk_layernorm") else QkNorm.NONE,
        mlp_bias=False,
    )


STABLELM = dense_family("stablelm", "StableLM 2, StableLM Zephyr 3B", "StableLmForCausalLM", read)
