"""Owns Mistral and Ministral: a Llama whose layers may slide. Decode thread."""

from __future__ import annotations

from worker.models.dense_config import DenseConfig, read_dense, sliding_layers
from worker.models.family import dense_family
from worker.models.settings import Settings


def read(settings: Settings) -> DenseConfig:
    """All layers slide if there is a window; Ministral may list which."""
    windowed = settings.get("sliding_window") is not None
    return read_dense(settings, mlp_bias=False, layers=sliding_layers(settings, lambda _: windowed))


MISTRAL = dense_family("mistral", "Mistral 7B, Ministral 8B", "MistralForCausalLM", read)
MINISTRAL = dense_family("ministral", "Ministral", "MinistralForCausalLM", read)
