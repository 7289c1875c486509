"""Owns what each of GGUF's architectures is called at Hugging Face: settings, tensors, rearrangements. Any thread.

A family that is added to `worker.models` gets one entry in `ARCHITECTURES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from worker.formats.errors import CheckpointError
from worker.formats.gguf_container import Container
from worker.formats.gguf_rope import rope_parameters
from worker.formats.gguf_settings import Settings

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_CONVOLUTIONS = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
_NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Tensors that are not taken: config.json has their values, or the model computes them.
_DROPPED = re.compile(r"^rope_(freqs|factors_long|factors_short)\.weight$|\.attn_rot_embd\.weight$")
_IN_LAYER = re.compile(r"^blk\.(\d+)\.([a-z0-9_.]+)\.(weight|bias)$")
_ON_TOP = re.compile(r"^([a-z_]+)\.(weight|bias)$")

Extra = Callable[[Settings], dict[str, Any]]


def _nothing(settings: Settings) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One entry: which family it is, and what differs from the dense decoder that all share."""

    family: str  # the class that config.json's `architectures` names
    model_type: str
    extra: Extra = _nothing  # settings of this family alone
    layer: dict[str, str] = field(default_factory=dict)  # names that differ from _LAYER
    top: dict[str, str] = field(default_factory=dict)  # and from _TOP
    experts: bool = False  # it has a mixture of them
    some_attend: bool = False  # layers that do not have no key heads
    interleaved: bool = False  # q and k are stored with the two halves of a rotary pair side by side
    norm_offset: bool = False  # norms are stored as w + 1, where the family adds the 1 itself
    eps: str = "attention.layer_norm_rms_epsilon"

    def config(self, container: Container) -> dict[str, Any]:
        """What config.json would say. Raises CheckpointError."""
        settings = Settings(container)
        if not self.experts and settings.maybe_count("expert_count"):
            raise CheckpointError(
                f"a mixture of experts of architecture {settings.architecture!r}, which is not served; "
                "dense models of it are",
                file=container.path,
            )
        words = container.tensors.get("token_embd.weight")
        if words is None or len(words.shape) != 2:
            raise CheckpointError("no 'token_embd.weight': not a language model", file=container.path)
        width, num_heads = settings.count("embedding_length"), settings.count("attention.head_count")
        head_dim = settings.count("attention.key_length", max(1, width // num_heads))
        if settings.count("attention.value_length", head_dim) != head_dim:
            raise settings.error("attention.value_length", f"is not that of the keys, {head_dim}")
        num_kv_heads = settings.count("attention.head_count_kv", num_heads, skip_zeros=self.some_attend)
        if num_heads % num_kv_heads:
            raise settings.error("attention.head_count", f"({num_heads}) is no multiple of {num_kv_heads}")
        return {
            "architectures": [self.family],
            "model_type": self.model_type,
            "vocab_size": words.shape[0],
            "hidden_size": width,
            "intermediate_size": settings.count("feed_forward_length"),
            "num_hidden_layers": settings.count("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": settings.count("context_length"),
            "rms_norm_eps": settings.number(self.eps),
            "rope_parameters": rope_parameters(settings, head_dim),
            "tie_word_embeddings": not settings.has("output.weight"),
            "hidden_act": "silu",
        } | self.extra(settings)

    def canonical(self, name: str) -> str | None:
        """GGUF's name of a tensor → Hugging Face's; None for a tensor that is computed; an unknown name stays as it is."""
        if _DROPPED.search(name):
            return None
        match = _IN_LAYER.match(name)
        if match:
            index, leaf, kind = match.groups()
            found = self.layer.get(leaf) or _LAYER.get(leaf)
            return f"model.layers.{index}.{found}.{kind}" if found else name
        match = _ON_TOP.match(name)
        found = (self.top.get(match[1]) or _TOP.get(match[1])) if match else None
        return f"{found}.{match[2]}" if match and found else name

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that models ask for a tensor (GGUF's name) in, of as many values in the same order."""
        if name.endswith("_exps.weight") and len(stored) == 3:
            return stored[0] * stored[1], stored[2]  # the rows of all experts in turn
        if name.endswith(".shortconv.conv.weight") and len(stored) == 2:
            return stored[0], 1, stored[1]
        return stored

    def is_interleaved(self, name: str) -> bool:
        """Whether the rows of this tensor (GGUF's name) are to be put back into halves."""
        match = _IN_LAYER.match(name)
        return self.interleaved and match is not None and match[2] in ("attn_q", "attn_k")

    def is_offset(self, name: str) -> bool:
        """Whether 1 is to be subtracted from this tensor (GGUF's name)."""
        return self.norm_offset and name.endswith("norm.weight")


def _llama(settings: Settings) -> dict[str, Any]:
    if settings.has("blk.0.attn_q.bias") and not settings.has("blk.0.attn_output.bias"):
        # Biases on q, k and v alone make it a Qwen2, which differs from a Llama in nothing else.
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {
        "attention_bias": settings.has("blk.0.attn_output.bias"),
        "mlp_bias": settings.has("blk.0.ffn_down.bias"),
    }


def _phi3(settings: Settings) -> dict[str, Any]:
    context = settings.count("context_length")
    return {
        "sliding_window": settings.maybe_count("attention.sliding_window"),
        "attention_bias": False,
        "original_max_position_embeddings": settings.count("rope.scaling.original_context_length", context),
    }


def _gemma(settings: Settings) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": settings.count("attention.sliding_window", 4096),
        # The file does not hold the scale of queries. The largest model of each generation scales by model width / heads,
        # all others by the width of a key head.
        "query_pre_attn_scalar": _gemma_scalar(settings),
        "attention_bias": False,
        "attn_logit_softcapping": settings.maybe_number("attn_logit_softcapping"),
        "final_logit_softcapping": settings.maybe_number("final_logit_softcapping"),
    }


def _gemma_scalar(settings: Settings) -> int:
    width, num_heads = settings.count("embedding_length"), settings.count("attention.head_count")
    largest = {"gemma2": 46, "gemma3": 62}[settings.architecture]
    if settings.count("block_count") == largest:
        return width // num_heads
    return settings.count("attention.key_length", width // num_heads)


def _gemma2(settings: Settings) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    num_layers = settings.count("block_count")
    return _gemma(settings) | {"layer_types": [kinds[index % 2] for index in range(num_layers)]}


def _gemma3(settings: Settings) -> dict[str, Any]:
    num_layers = settings.count("block_count")
    head_dim = settings.count("attention.key_length")
    full = rope_parameters(settings, head_dim)
    local = {"rope_type": "default", "rope_theta": settings.number("rope.freq_base_swa", 10000.0)}
    return _gemma(settings) | {
        "model_type": "gemma3_text",
        "layer_types": [
            "sliding_attention" if (index + 1) % 6 else "full_attention" for index in range(num_layers)
        ],
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


def _granite(settings: Settings) -> dict[str, Any]:
    return {
        "attention_multiplier": settings.number("attention.scale"),
        "embedding_multiplier": settings.number("embedding_scale", 1.0),
        "residual_multiplier": settings.number("residual_scale", 1.0),
        "logits_scaling": settings.number("logit_scale", 1.0),
        "attention_bias": settings.has("blk.0.attn_output.bias"),
        "mlp_bias": False,
    }


def _smollm3(settings: Settings) -> dict[str, Any]:
    # Every fourth layer has no positions: a constant of the architecture, in llama.cpp too.
    num_layers = settings.count("block_count")
    return {
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((index + 1) % 4 != 0) for index in range(num_layers)],
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
    }


def _stablelm(settings: Settings) -> dict[str, Any]:
    return {
        "layer_norm_eps": settings.number("attention.layer_norm_epsilon"),
        "use_qkv_bias": settings.has("blk.0.attn_q.bias"),
        "qk_layernorm": settings.has("blk.0.attn_q_norm.weight"),
        "use_parallel_residual": settings.flag("use_parallel_residual", False),
        "partial_rotary_factor": rope_parameters(settings, _head_dim(settings)).get(
            "partial_rotary_factor", 1.0
        ),
    }


def _qwen3_moe(settings: Settings) -> dict[str, Any]:
    return {
        "num_experts": settings.count("expert_count"),
        "num_experts_per_tok": settings.count("expert_used_count"),
        "moe_intermediate_size": settings.count("expert_feed_forward_length"),
        "norm_topk_prob": settings.flag("expert_weights_norm", True),  # llama.cpp always does
        "stacked_experts": True,
    }


def _lfm2(settings: Settings) -> dict[str, Any]:
    heads = settings.counts("attention.head_count_kv", settings.count("block_count"))
    return {
        "layer_types": ["full_attention" if num else "conv" for num in heads],
        "conv_L_cache": settings.count("shortconv.l_cache"),
        "conv_bias": any(settings.has(f"blk.{i}.shortconv.in_proj.bias") for i in range(len(heads))),
        "block_auto_adjust_ff_dim": False,
        "norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
    }


def _head_dim(settings: Settings) -> int:
    default = settings.count("embedding_length") // settings.count("attention.head_count")
    return settings.count("attention.key_length", default)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", _llama, interleaved=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe, layer=_EXPERTS, experts=True),
    "lfm2": Architecture(
        "Lfm2ForCausalLM",
        "lfm2",
        _lfm2,
        layer=_CONVOLUTIONS,
        # The norm behind the last layer, under a name that llama.cpp has given up since.
        top={"token_embd_norm": "model.embedding_norm", "output_norm": "model.embedding_norm"},
        some_attend=True,
    ),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", _phi3, layer={"ffn_up": "mlp.gate_up_proj"}),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", _gemma2, layer=_NORMS_AROUND, norm_offset=True),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", _gemma3, layer=_NORMS_AROUND, norm_offset=True
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", "olmo2", layer=_NORMS_AROUND),
    "granite": Architecture("GraniteForCausalLM", "granite", _granite, interleaved=True),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", _smollm3, interleaved=True),
    "stablelm": Architecture(
        "StableLmForCausalLM", "stablelm", _stablelm, eps="attention.layer_norm_epsilon"
    ),
}


def architecture_of(container: Container) -> Architecture:
    """The entry of a file's architecture. Raises CheckpointError naming it and what is served."""
    name = container.metadata.get("general.architecture")
    kind = container.metadata.get("general.type", "model")
    if name == "clip" or kind == "mmproj":
        raise CheckpointError(
            "the vision tower of a model (an mmproj file), not the model; give the other GGUF file",
            file=container.path,
        )
    if kind in ("adapter", "vocab", "imatrix") or name == "imatrix":
        raise CheckpointError(
            f"a GGUF file of kind {kind!r}, not a model; give the model's own file", file=container.path
        )
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(
            f"GGUF architecture {name!r} is not served; served are {', '.join(ARCHITECTURES)}",
            file=container.path,
        )
    return found
