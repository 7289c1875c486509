"""Owns SmolLM3: every fourth layer rotates nothing. Decode thread."""

from __future__ import annotations

from dataclasses import replace

from worker.models.dense_config import DenseConfig, read_dense, sliding_layers
from worker.models.family import dense_family
from worker.models.rope import parse_rope
from worker.models.settings import Settings
from worker.models.torch_attention import LayerAttention


def read(settings: Settings) -> DenseConfig:
    """`no_rope_layers` has a 1 for each layer that rotates; without it every `no_rope_layer_interval`-th layer does not
    rotate. Layers that do not rotate may slide."""
    num_layers = settings.size("num_hidden_layers")
    listed = settings.listed("no_rope_layers", num_layers)
    if listed is None:
        interval = settings.size("no_rope_layer_interval", 4)
        listed = [int((index + 1) % interval != 0) for index in range(num_layers)]
    slides = settings.flag("use_sliding_window") and settings.get("sliding_window") is not None
    layers = sliding_layers(settings, lambda index: slides and not listed[index])
    rope = parse_rope(settings, theta=2e6)
    biased = settings.flag("attention_bias")
    return read_dense(
        settings,
        ropes=(rope, replace(rope, kind="none", attention_factor=1.0)),
        layers=tuple(
            LayerAttention(layer.window, rotation=0 if turns else 1)
            for layer, turns in zip(layers, listed, strict=True)
        ),
        qkv_bias=biased,
        out_bias=biased,
    )


SMOLLM3 = dense_family("smollm3", "SmolLM3", "SmolLM3ForCausalLM", read)
