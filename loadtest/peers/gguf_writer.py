"""Owns turning a Llama checkpoint into GGUF for llama.cpp: the same weights in bf16. A command of its own, main thread.

`python -m loadtest.peers.gguf_writer FOLDER FILE`, in an environment with the gguf package; numpy comes with it.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.peers.side import load_attribute

_NORMAL_TOKEN = 1
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF. Raises KeyError for a tensor that a Llama does not have."""
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_NAMES[rest]}"
    return _NAMES[name]


def interleave_rotary(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection [heads * size, dim] reordered from halves to pairs.

    Hugging Face's Llama rotates (i, i + size/2), llama.cpp's rotates (2i, 2i + 1).
    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, dim = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, dim)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, dim)


def read_bf16(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Every tensor of a bf16 safetensors file, its bits as uint16. Raises ValueError for another dtype."""
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    data = np.memmap(path, np.uint8, "r", offset=8 + header_bytes)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}; only BF16 is converted")
        start, end = entry["data_offsets"]
        yield name, data[start:end].view(np.uint16).reshape(entry["shape"])


def write_gguf(folder: Path, target: Path) -> None:
    """Write the Llama checkpoint in `folder` to `target`: matrices in bf16, norms in fp32, as llama.cpp wants them."""
    writer_class = load_attribute("gguf", "GGUFWriter")
    bf16 = load_attribute("gguf", "GGMLQuantizationType").BF16
    config = json.loads((folder / "config.json").read_bytes())
    model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = writer_class(target, "llama")
    writer.add_name("bench")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config.get("rope_theta", 1e4)))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(model["vocab"]))
    writer.add_token_types([_NORMAL_TOKEN] * len(model["vocab"]))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_add_bos_token(False)
    for name, bits in read_bf16(folder / "model.safetensors"):
        if bits.ndim == 1:
            fp32 = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(gguf_name(name), fp32)
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = interleave_rotary(bits, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(bits).view(np.uint8), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
