"""Owns the settings of a dense decoder, as a Hugging Face config.json gives them. Decode thread.

A setting that would change the computation and is not built here is refused by name; settings that only concern
training are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from worker.models.rope import RopeConfig, most_context, parse_rope, usual_context
from worker.models.settings import Settings
from worker.models.torch_attention import LayerAttention

DEFAULT_CONTEXT_TOKENS = 8192  # if neither the folder nor the worker's settings name a context

_ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}  # True: the activation is the GELU


class QkNorm(Enum):
    """What normalises q and k before the rotation."""

    NONE = "none"
    HEAD = "rms"  # each head, by one weight (D,) for all of q and one for all of k
    WIDTH = "rms of all heads"  # all heads of q together, and of k, by weights as wide
    LAYER = "layer norm"  # each head by its own weight (D,), without bias


@dataclass(frozen=True, slots=True)
class NormNames:
    """What the norms around a layer's two halves are called; None where there is no norm.

    Those before a half norm its input, those after it what it adds to the residual stream.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """Layers that have many small gated MLPs, of which a router chooses a few for each token."""

    num_experts: int
    num_chosen: int  # of a token
    ff_dim: int  # of an expert
    sums_to_one: bool  # the weights of the chosen add up to 1
    layers: frozenset[int]  # all others have one MLP
    stacked: bool = False  # the file has all experts of a layer in one tensor


@dataclass(frozen=True, slots=True)
class ConvConfig:
    """Layers that mix tokens by a short convolution in place of attention."""

    num_taps: int
    bias: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A dense decoder: grouped-head attention and a gated MLP in each layer, and what a family has of its own."""

    vocab_size: int
    dim: int
    ff_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_tokens: int
    eps: float
    ropes: tuple[RopeConfig, ...]
    layers: tuple[LayerAttention, ...]  # one a layer; `rotation` counts within `ropes`
    tied: bool | None  # None: not said; tied if the checkpoint has no lm_head of its own
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gelu: bool = False  # the gate: GELU, tanh approximation, in place of SiLU
    qk_norm: QkNorm = QkNorm.NONE
    norms: NormNames = NormNames()
    layer_norm: bool = False  # LayerNorms with biases in place of RMS norms
    unit_offset: bool = False  # norms multiply by 1 + weight
    parallel: bool = False  # attention and MLP read the same norm, and both are added to its input
    fused_projections: bool = False  # stored as qkv_proj and gate_up_proj
    experts: MixtureConfig | None = None
    conv: ConvConfig | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what each half of a layer adds to the residual stream
    score_scale: float = 1.0  # of attention's scores, beside 1/sqrt(head_dim)
    logit_scale: float = 1.0
    logit_cap: float = 0.0  # c of c·tanh(l/c); 0: none
    dtype: torch.dtype | None = None  # of activations, known once the model loads; None: as the words come

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def q_dim(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated, the first ones."""
        return int(
            self.head_dim * self.ropes[0].fraction + 1e-6
        )  # the product may be just below a whole number


def read_dense(
    settings: Settings,
    *,
    head_dim: int | None = None,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    activation: str = "hidden_act",
    ropes: tuple[RopeConfig, ...] | None = None,
    layers: tuple[LayerAttention, ...] | None = None,
    **options: Any,
) -> DenseConfig:
    """What families have in common, under the names most of them share; `options` are fields of `DenseConfig`.

    `head_dim` is the family's own default, None for dim / heads; `eps` and `activation` are what it calls those, and
    the eps it has if nothing is said. Raises CheckpointError naming the first setting that is missing, impossible or not supported.
    """
    dim, num_heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    if settings.get("head_dim") is None and head_dim is None:
        if dim % num_heads:
            raise settings.fault("'hidden_size' does not divide into 'num_attention_heads'")
        head_dim = dim // num_heads
    head_dim = settings.size("head_dim", head_dim)
    num_kv_heads = settings.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise settings.fault("'num_attention_heads' does not divide into 'num_key_value_heads'")
    if head_dim % 2:
        raise settings.fault(f"'head_dim' is {head_dim}; rotary pairs need an even one")
    small = settings.above_0(*eps)
    if small >= 1:
        raise settings.fault(f"{eps[0]!r} is {small!r}; it lies between 0 and 1")
    named = settings.get(activation, "silu")
    if not isinstance(named, str) or named not in _ACTIVATIONS:
        raise settings.fault(f"{activation!r} is {named!r}; supported are {', '.join(_ACTIVATIONS)}")
    num_layers = settings.size("num_hidden_layers")
    ropes = ropes or (parse_rope(settings),)
    context = context_tokens(settings, ropes)
    if layers is None:
        layers = plain_layers(settings)
    config = DenseConfig(
        vocab_size=settings.size("vocab_size"),
        dim=dim,
        ff_dim=settings.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_tokens=context,
        eps=small,
        ropes=ropes,
        # A window as long as the context has no effect.
        layers=tuple(
            LayerAttention(0 if layer.window >= context else layer.window, layer.cap, layer.rotation)
            for layer in layers[:num_layers]
        ),
        tied=settings.flag("tie_word_embeddings")
        if settings.get("tie_word_embeddings") is not None
        else None,
        gelu=_ACTIVATIONS[named],
        **{"mlp_bias": settings.flag("mlp_bias")} | options,
    )
    _check_rotations(config, settings)
    return config


def _check_rotations(config: DenseConfig, settings: Settings) -> None:
    turned = config.rotary_dim
    if turned < 2 or turned % 2:
        raise settings.fault(
            f"'partial_rotary_factor' turns {turned} dimensions of a head; rotary pairs need an even number"
        )
    if config.score_scale != 1.0 and turned < config.head_dim:
        raise settings.fault("scaled scores of partly rotated heads are not supported")
    for rope in config.ropes:
        if rope.kind == "longrope" and not len(rope.short_factor) == len(rope.long_factor) == turned // 2:
            raise settings.fault(
                f"'short_factor' and 'long_factor' need {turned // 2} numbers each, one a rotated pair"
            )


def context_tokens(settings: Settings, ropes: tuple[RopeConfig, ...]) -> int:
    """The context to serve: the one asked for, as far as the model holds it, else the model's."""
    named = settings.size("max_position_embeddings", DEFAULT_CONTEXT_TOKENS)
    most = min(most_context(rope, named) for rope in ropes)
    asked = described(settings).get("context_tokens")
    if asked is None:
        return min(usual_context(rope, named) for rope in ropes)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise settings.fault("'degas.context_tokens' is not a whole number of at least 1")
    return min(asked, most)


def described(settings: Settings) -> dict[str, Any]:
    """The optional `degas` object of config.json: values that override what the rest of the folder says."""
    return settings.objects("degas")


def plain_layers(settings: Settings) -> tuple[LayerAttention, ...]:
    """Layers that attend to all. Raises CheckpointError where config.json asks for windows, which the family lacks."""
    num_layers = settings.size("num_hidden_layers")
    kinds = settings.listed("layer_types", num_layers) or []
    windowed = settings.get("use_sliding_window", True) and settings.get("sliding_window") is not None
    if windowed or any(kind != "full_attention" for kind in kinds):
        raise settings.fault("sliding-window attention is not part of this family's models")
    return (LayerAttention(),) * num_layers


def sliding_layers(
    settings: Settings,
    slides: Callable[[int], bool],
    *,
    cap: float = 0.0,
    local_rotation: int = 0,
) -> tuple[LayerAttention, ...]:
    """Layers of which some see `sliding_window` keys: those that `layer_types` names, else those that `slides` tells.

    `local_rotation` is the rotation of layers that slide, the others have the first.
    """
    num_layers = settings.size("num_hidden_layers")
    kinds = settings.listed("layer_types", num_layers)
    if kinds is None:
        kinds = ["sliding_attention" if slides(index) else "full_attention" for index in range(num_layers)]
    layers = []
    for kind in kinds:
        if kind == "full_attention":
            layers.append(LayerAttention(cap=cap))
        elif kind == "sliding_attention":
            layers.append(LayerAttention(settings.size("sliding_window"), cap, local_rotation))
        else:
            raise settings.fault(
                f"'layer_types' has {kind!r}; supported are full_attention and sliding_attention"
            )
    return tuple(layers)
