"""Owns Qwen 2, 2.5 and Qwen 3, dense and with experts. Decode thread."""

from __future__ import annotations

from dataclasses import replace

from worker.models.dense_config import (
    DenseConfig,
    MixtureConfig,
    QkNorm,
    plain_layers,
    read_dense,
    sliding_layers,
)
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


def read_qwen3_moe(settings: Settings) -> DenseConfig:
    """A Qwen 3 whose layers have experts, but those that config.json sets aside."""
    num_layers, num_experts = settings.size("num_hidden_layers"), _num_experts(settings)
    num_chosen = settings.size("num_experts_per_tok", 8)
    if num_chosen > num_experts:
        raise settings.fault(f"'num_experts_per_tok' is {num_chosen}, and there are {num_experts} experts")
    step, dense = settings.size("decoder_sparse_step", 1), settings.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(index) is not int for index in dense):
        raise settings.fault(f"'mlp_only_layers' is {dense!r}; a list of layers is expected")
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise settings.fault(f"'hidden_act' is {settings.get('hidden_act')!r}; supported is silu")
    mixture = MixtureConfig(
        num_experts,
        num_chosen,
        settings.size("moe_intermediate_size", 768),
        settings.flag("norm_topk_prob"),
        frozenset(index for index in range(num_layers) if (index + 1) % step == 0 and index not in dense),
        stacked=settings.flag("stacked_experts"),  # not config.json's: what a GGUF file's reader says
    )
    return replace(read_qwen3(settings), experts=mixture)


def _num_experts(settings: Settings) -> int:
    """transformers 5 calls them local experts."""
    return settings.size("num_experts", settings.size("num_local_experts", 128))


def _layers(settings: Settings) -> tuple[LayerAttention, ...]:
    """Released models name a window and do not use it; where `use_sliding_window` is set, the upper layers slide."""
    if not settings.flag("use_sliding_window") and settings.get("layer_types") is None:
        return (LayerAttention(),) * settings.size("num_hidden_layers")
    if not settings.flag("use_sliding_window"):
        return plain_layers(settings)
    first = settings.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise settings.fault(f"'max_window_layers' is {first!r}; a whole number is expected")
    windowed = settings.get("sliding_window") is not None
    return sliding_layers(settings, lambda index: windowed and index >= first)


QWEN2 = dense_family("qwen2", "Qwen 2 and 2.5, DeepSeek-R1-Distill-Qwen", "Qwen2ForCausalLM", read_qwen2)
QWEN3 = dense_family("qwen3", "Qwen 3 (dense)", "Qwen3ForCausalLM", read_qwen3)
QWEN3_MOE = dense_family("qwen3_moe", "Qwen 3 with experts (30B-A3B)", "Qwen3MoeForCausalLM", read_qwen3_moe)
