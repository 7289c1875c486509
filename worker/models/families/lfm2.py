"""Owns LFM2: short convolutions in most layers, attention with normed heads in the others. Decode thread."""

from __future__ import annotations

import re

from worker.formats.source import Target
from worker.models.dense_config import ConvConfig, DenseConfig, QkNorm, read_dense
from worker.models.family import dense_family
from worker.models.rope import parse_rope
from worker.models.settings import Settings
from worker.models.torch_attention import LayerAttention

_NAMES = (
    (r"\.operator_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.self_attn\.([qk])_layernorm\.", r".self_attn.\1_norm."),
    (r"^(model\.)?embedding_norm\.", "model.norm."),  # behind the last layer, whatever it is called
)


def rename(stored: str) -> Target:
    """The decoder's tensors under the names that all dense decoders have."""
    for pattern, name in _NAMES:
        stored = re.sub(pattern, name, stored)
    return Target(stored)


def read(settings: Settings) -> DenseConfig:
    """Which layers attend is said by `layer_types`, or by their numbers in `full_attn_idxs`."""
    num_layers = settings.size("num_hidden_layers")
    kinds = _kinds(settings, num_layers)
    conv = ConvConfig(
        _taps(settings),
        settings.flag("conv_bias"),
        frozenset(index for index, kind in enumerate(kinds) if kind == "conv"),
    )
    if len(conv.layers) == num_layers:
        raise settings.fault("no layer attends; at least one with keys and values is expected")
    given = {
        **settings.values,
        "intermediate_size": _ff_dim(settings),
        "tie_word_embeddings": settings.flag("tie_embedding", settings.flag("tie_word_embeddings", True)),
    }
    return read_dense(
        Settings(given, settings.file),
        eps=("norm_eps", 1e-5),
        ropes=(parse_rope(settings, theta=1000000.0),),
        layers=(LayerAttention(),) * num_layers,
        mlp_bias=False,
        qk_norm=QkNorm.HEAD,
        conv=conv if conv.layers else None,
    )


def _kinds(settings: Settings, num_layers: int) -> list[str]:
    kinds = settings.listed("layer_types", num_layers)
    if kinds is None:
        attending = settings.get("full_attn_idxs", list(range(num_layers)))
        if not isinstance(attending, list) or any(type(index) is not int for index in attending):
            raise settings.fault(f"'full_attn_idxs' is {attending!r}; a list of layers is expected")
        return ["full_attention" if index in attending else "conv" for index in range(num_layers)]
    for kind in kinds:
        if kind not in ("conv", "full_attention"):
            raise settings.fault(f"'layer_types' has {kind!r}; supported are conv and full_attention")
    return kinds


def _taps(settings: Settings) -> int:
    taps = settings.size("conv_L_cache", 3)
    if not 2 <= taps <= 16:
        raise settings.fault(f"'conv_L_cache' is {taps}; convolutions of 2 to 16 positions are supported")
    return taps


def _ff_dim(settings: Settings) -> int:
    """The MLP's width: two thirds of what is named, rounded up, unless the folder says that it is final."""
    width = settings.size("block_ff_dim", settings.size("intermediate_size", 12288))
    if not settings.flag("block_auto_adjust_ff_dim", True):
        return width
    multiple = settings.size("block_multiple_of", 256)
    width = int(settings.above_0("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
    return -(-width // multiple) * multiple


LFM2 = dense_family("lfm2", "LFM2 350M, 700M, 1.2B and 2.6B (text)", "Lfm2ForCausalLM", read, rename=rename)
