"""Owns models of true shapes with random weights, made on the device without a file. Whichever thread calls.

Speed depends on the number of weights, not on their values, so a machine without network can measure real shapes.
Shapes are those of the published config.json files.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from worker.formats.folder import Folder
from worker.formats.moondream_tokenizer import QUERY_ID, RESERVED
from worker.models.card import make_card as make_dense_card
from worker.models.dense import Dense
from worker.models.families import lfm2, llama, qwen
from worker.models.moondream import Moondream
from worker.models.moondream3 import Moondream3
from worker.models.moondream_card import make_card
from worker.models.moondream_config import parse_config
from worker.models.settings import Settings
from worker.native.quantised import Quantised, QuantisedWeight
from worker.native.quantised_source import HEADS
from worker.native.quantiser import KINDS_OF, fits, to_blocks

_QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_LFM2 = {
    "model_type": "lfm2",
    "conv_L_cache": 3,
    "block_auto_adjust_ff_dim": False,
    "max_position_embeddings": 128000,
    "rope_theta": 1e6,
    "norm_eps": 1e-5,
}
_SMALL_VISION = {"enc_n_layers": 1, "enc_dim": 32, "enc_ff_dim": 48, "enc_n_heads": 2, "crop_size": 70}

_SMALL_LLAMA = {
    "model_type": "llama",
    "head_dim": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}

_TINY_MOONDREAM: dict[str, Any] = {
    "model_type": "moondream1",
    "config": {
        "text": {
            "dim": 64,
            "ff_dim": 96,
            "n_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "vocab_size": 300,
            "max_context": 512,
        },
        "vision": _SMALL_VISION | {"proj_out_dim": 64, "proj_inner_dim": 48, "overlap_margin": 1},
        "region": {
            "dim": 64,
            "coord_feat_dim": 16,
            "coord_out_dim": 64,
            "size_feat_dim": 24,
            "size_out_dim": 128,
        },
    },
}
_TINY_TEXT = _TINY_MOONDREAM["config"]["text"]
_TINY_EXPERTS = {"num_experts": 8, "start_layer": 1, "experts_per_token": 3, "expert_inner_dim": 32}
_TINY_MOONDREAM_3 = {
    "model_type": "moondream3",
    "config": _TINY_MOONDREAM["config"] | {"text": _TINY_TEXT | {"moe": _TINY_EXPERTS}},
}

SHAPES: dict[str, dict[str, Any]] = {
    # 29.1M parameters: 12 layers of 2.16M and 3.1M embeddings, 58 MB in bf16.
    "llama-30m": _SMALL_LLAMA
    | {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "vocab_size": 8192,
    },
    # The sizes of Qwen2.5-0.5B: 494M parameters, 988 MB in bf16.
    "llama-0.5b": _SMALL_LLAMA
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "vocab_size": 151936,
    },
    "moondream2": {"model_type": "moondream1", "config": {}},
    # 9.3B parameters, of which a token reads 2B: 18.5 GB in bf16.
    "moondream3": {"model_type": "moondream3", "config": {}},
    "qwen3-0.6b": _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144},
    "llama-3.2-1b": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    # 30.5 billion parameters, 61 GB in bf16, of which a token reads 3.3 billion.
    "qwen3-30b-a3b": _QWEN3
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "lfm2-1.2b": _LFM2
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "vocab_size": 65536,
    },
    # For smoke runs and tests, never for figures.
    "tiny-moondream": _TINY_MOONDREAM,
    "tiny-moondream3": _TINY_MOONDREAM_3,
    "tiny-qwen3": _QWEN3
    | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 300,
    },
    "tiny-qwen3-moe": _QWEN3
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 300,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "tiny-lfm2": _LFM2
    | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 5,
        "full_attn_idxs": [2, 4],
        "vocab_size": 300,
    },
    "tiny-llama": {
        "model_type": "llama",
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "vocab_size": 300,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}


_DENSE = {
    "qwen3": ("Qwen3ForCausalLM", qwen.read_qwen3),
    "qwen3_moe": ("Qwen3MoeForCausalLM", qwen.read_qwen3_moe),
    "lfm2": ("Lfm2ForCausalLM", lfm2.read),
    "llama": ("LlamaForCausalLM", llama.read),
}
_TABLES = ("model.embed_tokens.weight",)
_READ_BY_STEPS = ("text.blocks", "text.lm_head", "text.post_ln", "model.layers", "model.norm", "lm_head")


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A model, and how many bytes of its weights one decode step must read whatever the batch: of experts those of one row."""

    model: Moondream | Dense
    decode_bytes: int


def random_model(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    context_tokens: int = 2048,
    folder: Path | None = None,
    seed: int = 0,
) -> RandomModel:
    """A model of `SHAPES[shape]`: weights of deviation 0.02, norms of ones, biases of zeros. `shape` may end in `:int8` or
    `:int4`: matrices of products are then in blocks, as `quantize` makes them.

    With a `folder` it is also left there as a checkpoint that `degas serve --model` loads, with a tokenizer of
    made-up words.
    """
    shape, _, quantize = shape.partition(":")
    raw = dict(SHAPES[shape])
    generator = torch.Generator(device).manual_seed(seed)
    taken: dict[str, Tensor] = {}
    all_bytes = decode_bytes = 0

    def count(name: str, num_bytes: int, *, is_table: bool = False) -> None:
        nonlocal all_bytes, decode_bytes
        all_bytes += num_bytes
        # A step reads one row of an embedding table for each token, but all of a tied table, which is also the head.
        tied = name == "model.embed_tokens.weight" and raw.get("tie_word_embeddings")
        if not is_table and (tied or name.startswith(_READ_BY_STEPS)):
            is_expert = ".experts." in name
            decode_bytes += (
                num_bytes * raw["num_experts_per_tok"] // raw["num_experts"] if is_expert else num_bytes
            )

    def take_weight(name: str, *size: int) -> Tensor | Quantised:
        tensor = draw(*size)
        kind = KINDS_OF["int8" if name.endswith(HEADS) else quantize]
        if not fits(tensor):
            count(name, tensor.nbytes)
            return tensor
        blocks = to_blocks(tensor.float(), kind)
        count(name, blocks.nbytes)
        return QuantisedWeight(kind, tensor.shape[0], tensor.shape[1], blocks)

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)

    def take(name: str, *size: int, dtype: torch.dtype = dtype) -> Tensor:
        if name.endswith("bias"):
            tensor = torch.zeros(size, dtype=dtype, device=device)
        elif name.endswith("weight") and len(size) == 1:
            tensor = torch.ones(size, dtype=dtype, device=device)
        else:
            tensor = draw(*size, dtype=dtype)
        count(name, tensor.nbytes, is_table=bool(quantize) and name in _TABLES)
        if folder is not None:
            taken[name] = tensor.to("cpu", copy=True)
        return tensor

    with tempfile.TemporaryDirectory(prefix="degas-shape-") as name:
        home = folder or Path(name)
        home.mkdir(parents=True, exist_ok=True)
        model: Moondream | Dense
        described: dict[str, Any] = {"model_id": shape}
        if raw["model_type"] in ("moondream1", "moondream3"):
            raw |= {"architectures": ["HfMoondream"], "degas": described}
            (home / "config.json").write_text(json.dumps(raw))
            source = Folder(home)
            config = parse_config(raw, source.settings_file)
            build = Moondream if config.text.moe is None else Moondream3
            model = build(config, make_card(config, source), take, device, take_weight if quantize else None)
            if isinstance(model, Moondream3):
                decode_bytes = model.step_bytes  # of the experts, those that one token chooses
        else:
            kind = str(raw["model_type"])
            named, read = _DENSE[kind]
            raw |= {"architectures": [named], "degas": described | {"context_tokens": context_tokens}}
            (home / "config.json").write_text(json.dumps(raw))
            source = Folder(home)
            sizes = read(Settings(raw, source.settings_file))
            model = Dense(
                sizes, make_dense_card(sizes, source, kind), take, device, take_weight if quantize else None
            )
        if folder is not None:
            save_file(taken, folder / "model.safetensors")
            (folder / "tokenizer.json").write_text(json.dumps(_words(model.card.vocab_size)))
    model.weight_bytes = all_bytes
    return RandomModel(model, decode_bytes)


def _words(vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json whose id n is the word "wn"; any other word is id 8. It passes for Moondream's own where it is large
    enough: a worker refuses a folder whose tokenizer is another."""
    names = {n: f"w{n}" for n in range(vocab_size)}
    if vocab_size > QUERY_ID:
        names |= RESERVED | {QUERY_ID: "query"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {name: n for n, name in names.items()}, "unk_token": "w8"},
    }


def main(
    shape: Annotated[str, typer.Argument(help=f"One of {', '.join(sorted(SHAPES))}.")],
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the weights.")] = "bfloat16",
) -> None:
    """Leave a random checkpoint of that shape in the folder."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(sorted(SHAPES))}", param_hint="SHAPE")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        made = random_model(shape, device, getattr(torch, dtype), folder=folder)
    print(f"{shape}: {made.model.weight_bytes >> 20} MiB of weights in {folder}")


if __name__ == "__main__":
    typer.run(main)
