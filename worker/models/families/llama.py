"""Owns the Llama family: the decoder that the others differ from. Decode thread."""

from __future__ import annotations

from worker.models.dense_config import DenseConfig, read_dense
from worker.models.family import dense_family
from worker.models.settings import Settings


def read(settings: Settings) -> DenseConfig:
    """One setting for the biases of all four products of attention."""
    biased = settings.flag("attention_bias")
    return read_dense(settings, qkv_bias=biased, out_bias=biased)


LLAMA = dense_family(
    "llama",
    "Llama 2 and 3, SmolLM2, TinyLlama, Falcon 3, DeepSeek-R1-Distill-Llama",
    "LlamaForCausalLM",
    read,
)
