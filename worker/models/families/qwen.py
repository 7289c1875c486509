"""Owns Qwen 2, 2.5 and the dense Qwen 3. Decode thread."""

from __future__ import annotations

from worker.models.dense_config import DenseConfig, QkNorm, plain_layers, read_dense, sliding_layers
from worker.models.family import dense_family
from worker.models.rope import RopeConfig
from worker.models.settings import Settings
from worker.models.torch_attention import LayerAttention


def read_qwen2(settings: Settings, ropes: tuple[RopeConfig, ...] | None = None) -> DenseConfig:
    """Biases on q, k and v, whatever config.json says, and none on the way out. `ropes` in place of its own reading."""
    return read_dense(settings, ropes=ropes, qkv_bias=True, layers=_layers(settings), mlp_bias=False)


def read_qwen3(settings: Settings, ropes: tuple[RopeConfig, ...] | None = None) -> DenseConfig:
    """RMS norms of each head, which is 128 wide whatever hidden_size is, unless config.json says otherwise."""
    biased = settings.flag("attention_bias")
    return read_dense(
        settings,
        head_dim=128,
        ropes=ropes,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=False,
        qk_norm=QkNorm.HEAD,
        layers=_layers(settings),
    )


def _layers(settings: Settings) -> tuple[LayerAttention, ...]:
    """Released models name a window and do not use it; where `use_sliding_window` is set, the upper layers slide."""
    if not settings.flag("use_sliding_window") and settings.get("layer_types") is None:
        return (LayerAttention(),) * settings.size("num_hidden_layers")
    if not settings.flag("use_sliding_window"):
        return plain_layers(settings)
    first = settings.get("max_window_layers", 28)
    windowed = settings.get("sliding_window") is not None
    return sliding_layers(settings, lambda index: windowed and index >= first)


QWEN2 = dense_family("qwen2", "Qwen 2 and 2.5, DeepSeek-R1-Distill-Qwen", "Qwen2ForCausalLM", read_qwen2)
QWEN3 = dense_family("qwen3", "Qwen 3 (dense)", "Qwen3ForCausalLM", read_qwen3)
