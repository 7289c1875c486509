"""Owns what a Hugging Face folder says of a dense decoder: sizes, special ids, defaults, and the card. Decode thread.

A setting that would change the computation and is not built here is refused by name; settings that only concern
training are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.protocol import ModelCard
from worker.formats.source import CheckpointError, Source
from worker.models.rope import RopeConfig, parse_rope

# What is promised to clients unless the folder asks for another bound: block tables and rotary tables of every
# slot are as wide as this, and these models name contexts of 40,000 tokens and more that few requests reach.
MAX_CONTEXT_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """Sizes of a dense decoder: RMS norms, rotary grouped-head attention and a gated MLP in each layer."""

    vocab_size: int
    dim: int
    ff_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_tokens: int
    eps: float
    rope: RopeConfig
    tied: bool | None  # None: not said; tied if the checkpoint has no lm_head of its own
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def q_dim(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim


def parse_config(
    config: dict[str, Any], file: Path, *, model_type: str, qk_norm: bool, head_dim: int | None = None
) -> DenseConfig:
    """Read the sizes out of a config.json, which errors name as `file`. `head_dim` is the family's own default, None for dim / heads.

    Raises CheckpointError naming the first setting that is missing, impossible or not supported.
    """
    _refuse_unsupported(config, file, model_type)

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{name!r} is missing or not a whole number of at least 1", file=file)
        return value

    def flag(name: str) -> bool:
        value = config.get(name) or False
        if not isinstance(value, bool):
            raise CheckpointError(f"{name!r} is neither true nor false", file=file)
        return value

    dim, num_heads = size("hidden_size"), size("num_attention_heads")
    if config.get("head_dim") is None and head_dim is None:
        if dim % num_heads:
            raise CheckpointError("'hidden_size' does not divide into 'num_attention_heads'", file=file)
        head_dim = dim // num_heads
    head_dim = size("head_dim", head_dim)
    num_kv_heads = size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError("'num_attention_heads' does not divide into 'num_key_value_heads'", file=file)
    if head_dim % 2:
        raise CheckpointError(f"'head_dim' is {head_dim}; rotary pairs need an even one", file=file)
    eps = config.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise CheckpointError(f"'rms_norm_eps' is {eps!r}; it lies between 0 and 1", file=file)
    return DenseConfig(
        vocab_size=size("vocab_size"),
        dim=dim,
        ff_dim=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_tokens=min(size("max_position_embeddings"), _described_context(config, file)),
        eps=float(eps),
        rope=parse_rope(config, file),
        tied=flag("tie_word_embeddings") if config.get("tie_word_embeddings") is not None else None,
        attention_bias=flag("attention_bias"),
        mlp_bias=flag("mlp_bias"),
        qk_norm=qk_norm,
    )


def _refuse_unsupported(config: dict[str, Any], file: Path, model_type: str) -> None:
    named = config.get("model_type", model_type)
    if named != model_type:
        raise CheckpointError(f"'model_type' is {named!r}, not {model_type!r} as its architecture", file=file)
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and any("Model" in str(name) for name in auto_map):
        raise CheckpointError(
            "this checkpoint wants code of its own (auto_map), which is never run", file=file
        )
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            raise CheckpointError(f"{name!r}: quantised weights are not supported", file=file)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(
            f"'hidden_act' is {config['hidden_act']!r}; only 'silu' is supported", file=file
        )
    layer_types = config.get("layer_types") or []
    windowed = config.get("use_sliding_window", True) and config.get("sliding_window") is not None
    if windowed or config.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError("sliding-window attention is not supported", file=file)


def _described(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The optional `degas` object of config.json: what whoever serves the folder wants said otherwise."""
    described = config.get("degas") or {}
    if not isinstance(described, dict):
        raise CheckpointError("'degas' is not an object", file=file)
    return described


def _described_context(config: dict[str, Any], file: Path) -> int:
    value = _described(config, file).get("context_tokens", MAX_CONTEXT_TOKENS)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError("'degas.context_tokens' is not a whole number of at least 1", file=file)
    return value


def make_card(sizes: DenseConfig, source: Source, family: str) -> ModelCard:
    """What gateways are told. Ids and sampling defaults come from generation_config.json, else config.json.

    Raises CheckpointError on ids outside the vocabulary.
    """
    raw, generation, file = source.config, source.generation, source.settings_file
    described = _described(raw, file)
    bos_ids = _ids("bos_token_id", generation, raw, sizes.vocab_size, file)
    eos_ids = _ids("eos_token_id", generation, raw, sizes.vocab_size, file)
    eos_ids += [token_id for token_id in source.end_tokens() if token_id not in eos_ids]
    temperature, top_p, top_k = _sampling(generation, source.path / "generation_config.json")
    return ModelCard(
        model_id=str(described.get("model_id") or source.model_id),
        family=family,
        context_tokens=sizes.context_tokens,
        vocab_size=sizes.vocab_size,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=eos_ids,
        created=source.created,
        capabilities=["chat", "completions"],
        default_temperature=temperature,
        default_top_p=top_p,
        description=str(described.get("description") or ""),
        default_top_k=top_k,
    )


def _ids(
    name: str, generation: dict[str, Any], config: dict[str, Any], vocab_size: int, file: Path
) -> list[int]:
    """One id or a list of them; an instruct model's generation_config.json knows more ends than config.json."""
    value = generation.get(name)
    if value is None:
        value = config.get(name)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise CheckpointError(f"{name!r} is {token_id!r}; ids lie in 0 … {vocab_size - 1}", file=file)
    return list(dict.fromkeys(ids))


def _sampling(generation: dict[str, Any], file: Path) -> tuple[float, float, int]:
    """The defaults (temperature, top_p, top_k; 0 is no limit): greedy unless the folder asks for sampling."""
    sampled = generation.get("do_sample")
    temperature = generation.get("temperature")
    if sampled is False or (temperature is None and not sampled):
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0
    top_p = generation.get("top_p")
    if top_p is None:
        top_p = 1.0
    for name, value, high in (("temperature", temperature, 100.0), ("top_p", top_p, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise CheckpointError(f"{name!r} is {value!r}; it lies in 0 … {high:g}", file=file)
    top_k = 0 if generation.get("top_k") is None else generation["top_k"]
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k < 1 << 31:
        raise CheckpointError(
            f"'top_k' is {top_k!r}; it is a whole number of at least 0, 0 for no limit", file=file
        )
    return float(temperature), float(top_p), top_k
