"""Owns Gemma 2 and the text models of Gemma 3: norms on both sides, scaled embeddings, layers that slide. Decode thread."""

from __future__ import annotations

from typing import Any

from worker.models.dense_config import DenseConfig, NormNames, QkNorm, read_dense, sliding_layers
from worker.models.family import dense_family
from worker.models.rope import RopeConfig, parse_rope
from worker.models.settings import Settings

_NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def read_gemma2(settings: Settings) -> DenseConfig:
    """Scores and logits are capped; every other layer slides, the first included."""
    cap = _cap(settings, "attn_logit_softcapping", 50.0)
    return _read(
        settings,
        layers=sliding_layers(settings, lambda index: index % 2 == 0, cap=cap),
        logit_cap=_cap(settings, "final_logit_softcapping", 30.0),
    )


def read_gemma3(settings: Settings) -> DenseConfig:
    """Norms of each q and k head; of six layers five slide, by a rotation of their own."""
    if settings.get("attn_logit_softcapping") is not None:
        raise settings.fault("'attn_logit_softcapping' is not part of Gemma 3")
    pattern = settings.size("sliding_window_pattern", settings.size("_sliding_window_pattern", 6))
    return _read(
        settings,
        qk_norm=QkNorm.HEAD,
        ropes=(parse_rope(settings, theta=1e6, layer_type="full_attention"), _local_rope(settings)),
        layers=sliding_layers(settings, lambda index: (index + 1) % pattern != 0, local_rotation=1),
        logit_cap=_cap(settings, "final_logit_softcapping", None),
    )


def _read(settings: Settings, **options: Any) -> DenseConfig:
    if settings.flag("use_bidirectional_attention"):
        raise settings.fault("'use_bidirectional_attention' is not supported: this is an encoder of texts")
    biased = settings.flag("attention_bias")
    head_dim = settings.size("head_dim", 256)
    given = settings.get("hidden_activation")
    return read_dense(
        settings,
        head_dim=head_dim,
        activation="hidden_act" if given is None and settings.get("hidden_act") else "hidden_activation",
        norms=_NORMS,
        unit_offset=True,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=False,
        embedding_scale=settings.size("hidden_size") ** 0.5,
        score_scale=(head_dim / settings.above_0("query_pre_attn_scalar", 256)) ** 0.5,
        **options,
    )


def _local_rope(settings: Settings) -> RopeConfig:
    """The rotation of layers that slide: never scaled in the older layout of config.json."""
    newer = settings.objects("rope_parameters")
    if isinstance(newer.get("sliding_attention"), dict):
        return parse_rope(settings, layer_type="sliding_attention")
    return RopeConfig(settings.above_0("rope_local_base_freq", 10000.0))


def _cap(settings: Settings, name: str, default: float | None) -> float:
    """The cap: the family's if the folder does not name one, 0 (no cap) if it names null."""
    if name not in settings.values:
        return default or 0.0
    return 0.0 if settings.values[name] is None else settings.above_0(name)


GEMMA2 = dense_family("gemma2", "Gemma 2", "Gemma2ForCausalLM", read_gemma2)
GEMMA3 = dense_family("gemma3_text", "Gemma 3 270M and 1B (text)", "Gemma3ForCausalLM", read_gemma3)
