"""Owns tiny random GGUF files, written as llama.cpp's converter writes them, and what transformers says of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
INTERLEAVED = ("llama", "granite", "smollm3")
OFFSET = ("gemma2", "gemma3")


def make_oracle(model_type: str, **settings: Any) -> Any:
    """transformers' own random model of a family, in fp32."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        model_type, **{**SIZES, "initializer_range": 0.25, **copy.deepcopy(settings)}
    )
    oracle = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.2)
    return oracle


def write_gguf(
    path: Path, oracle: Any, architecture: str, *, quant: str = "Q8_0", settings: dict[str, Any] | None = None
) -> Path:
    """Write the oracle's weights, matrices quantised; the oracle keeps the values that they come back as.

    `settings` are added to those of all architectures; a None takes one away.
    """
    config = oracle.config
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    writer = gguf.GGUFWriter(path, architecture)
    given: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "rope.freq_base": 10000.0,
        "rope.dimension_count": getattr(config, "head_dim", None),
    }
    for name, value in {**given, **(settings or {})}.items():
        add_setting(writer, f"{architecture}.{name}", value)
    add_byte_tokens(writer, config.vocab_size)
    with torch.no_grad():
        for name, weight in apart(oracle.state_dict()):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert stored is not None, name
            values = weight.float().numpy().copy()
            if architecture in INTERLEAVED and ("q_proj" in name or "k_proj" in name):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                shape = values.shape
                values = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2)
                values = np.ascontiguousarray(values.reshape(shape))
            if architecture in OFFSET and name.endswith("norm.weight"):
                values = values + 1
            if ".conv.conv." in name:
                values = values.squeeze(1)
            if values.ndim >= 2 and ".mlp.gate." not in name and ".conv.conv." not in name:
                kind = gguf.GGMLQuantizationType[quant]
                packed = quantize(values, kind)
                writer.add_tensor(stored, packed, raw_dtype=kind)
                kept = quantize(weight.float().numpy(), kind)  # blocks lie within rows: order does not matter
                weight.copy_(torch.from_numpy(dequantize(kept, kind)).view(weight.shape))
            else:
                writer.add_tensor(stored, values)
    return close(writer, path)


def apart(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Gate and up as tensors of their own, in the same memory, where transformers has all experts' in one."""
    for name, weight in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, 1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        else:
            yield name + ".weight" * name.endswith("experts.down_proj"), weight


def add_setting(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One setting of the type that its value has."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


def add_byte_tokens(writer: gguf.GGUFWriter, size: int, pre: str = "gpt-2") -> None:
    """A vocabulary of all bytes, a few merges and marks: enough to speak any text."""
    alphabet = [chr(c) for c in printable_bytes()]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", *alphabet, "th", "the", "Ġt", "Ġthe"]
    types = [3, 3, 3, 4] + [1] * (len(tokens) - 4)
    while len(tokens) < size:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", tokens[:size])
    writer.add_array("tokenizer.ggml.token_type", types[:size])
    writer.add_array("tokenizer.ggml.merges", ["t h", "th e", "Ġ t", "Ġ the"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    writer.add_string("tokenizer.chat_template", "{{ messages[0]['content'] }}<|im_end|>")


def printable_bytes() -> list[int]:
    """The code point that stands for each byte in byte-level vocabularies."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [byte if byte in kept else next(rest) for byte in range(256)]


def close(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Write it all out."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
