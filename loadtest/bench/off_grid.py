"""Owns a float folder of a quantised Llama, for `degas bench quality`: the same function, off its file's own levels. Main thread.

Weights that were rounded to blocks once come through the same rounding unchanged, which would flatter it. So each input of a
product is scaled by a random factor, and whatever feeds it by the inverse: norms before q, k, v, gate and up; up's outputs
before down; v's outputs before the output projection. In fp32 the model computes what it computed.
`python -m loadtest.bench.off_grid smollm2 FOLDER`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from worker.formats.locate import locate
from worker.formats.open_source import open_source

CPU = torch.device("cpu")


def main(
    model: Annotated[str, typer.Argument(help="A Llama with tied embeddings: smollm2, or its GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="Made if need be.")],
    most: Annotated[float, typer.Option(help="Largest factor; the smallest is its inverse.")] = 1.25,
) -> None:
    """Write config.json, model.safetensors (fp32) and tokenizer.json."""
    source = open_source(locate(model))
    config = {**source.config, "tie_word_embeddings": True}
    open_tensors = source.open(lambda *_: None)
    torch.manual_seed(0)

    def take(name: str, *shape: int) -> Tensor:
        return open_tensors.take(name, *shape, device=CPU, dtype=torch.float32)

    tensors = scaled_llama(take, config, most)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_bytes(source.tokenizer())


def scaled_llama(take: Any, config: dict[str, Any], most: float) -> dict[str, Tensor]:
    """Every tensor by its name, each product's inputs scaled between 1 / most and most."""
    dim, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or dim // heads

    def factors(count: int) -> Tensor:
        return most ** (2 * torch.rand(count) - 1)

    tensors = {
        "model.embed_tokens.weight": take("model.embed_tokens.weight", config["vocab_size"], dim),
        "model.norm.weight": take("model.norm.weight", dim),
    }
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}"
        shapes = {
            "self_attn.q_proj": (heads * width, dim),
            "self_attn.k_proj": (kv_heads * width, dim),
            "self_attn.v_proj": (kv_heads * width, dim),
            "self_attn.o_proj": (dim, heads * width),
            "mlp.gate_proj": (inner, dim),
            "mlp.up_proj": (inner, dim),
            "mlp.down_proj": (dim, inner),
        }
        part = {one: take(f"{name}.{one}.weight", *shape) for one, shape in shapes.items()}
        for norm, fed in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            by = factors(dim)
            tensors[f"{name}.{norm}.weight"] = take(f"{name}.{norm}.weight", dim) / by
            for one in fed:
                part[one] = part[one] * by
        by = factors(inner)
        part["mlp.up_proj"] = part["mlp.up_proj"] / by.unsqueeze(1)
        part["mlp.down_proj"] = part["mlp.down_proj"] * by
        by = factors(kv_heads * width)
        part["self_attn.v_proj"] = part["self_attn.v_proj"] / by.unsqueeze(1)
        shared = by.view(kv_heads, 1, width).expand(-1, heads // kv_heads, -1).reshape(-1)
        part["self_attn.o_proj"] = part["self_attn.o_proj"] * shared
        tensors |= {f"{name}.{one}.weight": weight.contiguous() for one, weight in part.items()}
    return tensors


if __name__ == "__main__":
    typer.run(main)
