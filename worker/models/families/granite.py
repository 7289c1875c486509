"""Owns Granite 3: a Llama with a factor on embeddings, scores, residual sums and logits. Decode thread."""

from __future__ import annotations

from worker.models.dense_config import DenseConfig, read_dense
from worker.models.family import dense_family
from worker.models.settings import Settings


def read(settings: Settings) -> DenseConfig:
    """`attention_multiplier` stands in place of 1/sqrt(head_dim)."""
    biased = settings.flag("attention_bias")
    head_dim = settings.size("head_dim", settings.size("hidden_size") // settings.size("num_attention_heads"))
    return read_dense(
        settings,
        qkv_bias=biased,
        out_bias=biased,
        embedding_scale=settings.above_0("embedding_multiplier", 1.0),
        residual_scale=settings.above_0("residual_multiplier", 1.0),
        score_scale=settings.above_0("attention_multiplier", 1.0) * head_dim**0.5,
        logit_scale=1.0 / settings.above_0("logits_scaling", 1.0),
    )


GRANITE = dense_family("granite", "Granite 3 (dense)", "GraniteForCausalLM", read)
