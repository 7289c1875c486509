"""Owns OLMo 2: norms behind each half of a layer, and of q and k over all heads. Decode thread."""

from __future__ import annotations

from worker.models.dense_config import DenseConfig, NormNames, QkNorm, read_dense
from worker.models.family import dense_family
from worker.models.settings import Settings

_NORMS = NormNames(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)


def read(settings: Settings) -> DenseConfig:
    """The residual stream itself goes into attention and MLP."""
    biased = settings.flag("attention_bias")
    return read_dense(
        settings,
        eps=("rms_norm_eps", 1e-5),
        norms=_NORMS,
        qk_norm=QkNorm.WIDTH,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=False,
    )


OLMO2 = dense_family("olmo2", "OLMo 2", "Olmo2ForCausalLM", read)
