"""Owns small random Moondream checkpoints in either layout of names, for tests of loading and batching."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SECTIONS: dict[str, Any] = {
    "text": {
        "dim": 128,
        "ff_dim": 192,
        "n_layers": 2,
        "vocab_size": 96,
        "max_context": 256,
        "n_heads": 2,
        "n_kv_heads": 2,
    },
    "vision": {
        "enc_dim": 32,
        "enc_n_layers": 2,
        "enc_ff_dim": 48,
        "enc_n_heads": 2,
        "proj_out_dim": 128,
        "proj_inner_dim": 64,
        "crop_size": 70,
        "overlap_margin": 1,
        "max_crops": 4,
    },
    "region": {
        "dim": 128,
        "coord_feat_dim": 16,
        "coord_out_dim": 64,
        "size_feat_dim": 24,
        "size_out_dim": 128,
        "inner_dim": 32,
    },
}

_OLDER = (
    (r"vision\.patch_emb\.", "vision_encoder.encoder.model.visual.patch_embed.linear."),
    (r"vision\.pos_emb$", "vision_encoder.encoder.model.visual.pos_embed"),
    (r"vision\.post_ln\.", "vision_encoder.encoder.model.visual.norm."),
    (r"vision\.blocks\.(\d+)\.ln(\d)\.", r"vision_encoder.encoder.model.visual.blocks.\1.norm\2."),
    (r"vision\.blocks\.", "vision_encoder.encoder.model.visual.blocks."),
    (r"vision\.proj_mlp\.", "vision_encoder.projection.mlp."),
    (r"text\.wte$", "text_model.transformer.embd.wte.weight"),
    (r"text\.post_ln\.", "text_model.lm_head.ln."),
    (r"text\.lm_head\.", "text_model.lm_head.linear."),
    (r"text\.blocks\.(\d+)\.attn\.qkv\.", r"text_model.transformer.h.\1.mixer.Wqkv."),
    (r"text\.blocks\.(\d+)\.attn\.proj\.", r"text_model.transformer.h.\1.mixer.out_proj."),
    (r"text\.blocks\.", "text_model.transformer.h."),
    (r"region\.coord_features$", "region_model.coordinate_features.weight"),
    (r"region\.size_features$", "region_model.size_features.weight"),
    (r"region\.coord_", "region_model.coordinate_"),
    (r"region\.", "region_model."),
)


def random_tensors(sections: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of these sizes, by its name in the released layout, fp32."""
    chosen = sections or SECTIONS
    text, vision, region = chosen["text"], chosen["vision"], chosen["region"]
    generator = torch.Generator().manual_seed(11)
    tensors: dict[str, Tensor] = {}

    def put(name: str, *shape: int, scale: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if scale is None else scale
        tensors[f"model.{name}"] = torch.randn(shape, generator=generator) * spread

    def linear(name: str, inputs: int, outputs: int) -> None:
        put(f"{name}.weight", outputs, inputs)
        put(f"{name}.bias", outputs, scale=0.1)

    def norm(name: str, dim: int) -> None:
        put(f"{name}.weight", dim, scale=0.1)
        tensors[f"model.{name}.weight"] += 1
        put(f"{name}.bias", dim, scale=0.1)

    dim = text["dim"]
    put("text.wte", text["vocab_size"], dim, scale=1.0)
    norm("text.post_ln", dim)
    linear("text.lm_head", dim, text["vocab_size"])
    for index in range(text["n_layers"]):
        name = f"text.blocks.{index}"
        norm(f"{name}.ln", dim)
        linear(f"{name}.attn.qkv", dim, dim + 2 * dim * text["n_kv_heads"] // text["n_heads"])
        linear(f"{name}.attn.proj", dim, dim)
        linear(f"{name}.mlp.fc1", dim, text["ff_dim"])
        linear(f"{name}.mlp.fc2", text["ff_dim"], dim)
    dim, patch = vision["enc_dim"], vision.get("enc_patch_size", 14)
    linear("vision.patch_emb", 3 * patch * patch, dim)
    put("vision.pos_emb", 1, (vision["crop_size"] // patch) ** 2, dim, scale=0.5)
    norm("vision.post_ln", dim)
    for index in range(vision["enc_n_layers"]):
        name = f"vision.blocks.{index}"
        norm(f"{name}.ln1", dim)
        norm(f"{name}.ln2", dim)
        linear(f"{name}.attn.qkv", dim, 3 * dim)
        linear(f"{name}.attn.proj", dim, dim)
        linear(f"{name}.mlp.fc1", dim, vision["enc_ff_dim"])
        linear(f"{name}.mlp.fc2", vision["enc_ff_dim"], dim)
    linear("vision.proj_mlp.fc1", 2 * dim, vision["proj_inner_dim"])
    linear("vision.proj_mlp.fc2", vision["proj_inner_dim"], vision["proj_out_dim"])
    dim = region["dim"]
    put("region.coord_features", 1, region["coord_feat_dim"] // 2, scale=2.0)
    put("region.size_features", 2, region["size_feat_dim"] // 2, scale=2.0)
    linear("region.coord_encoder", region["coord_feat_dim"], dim)
    linear("region.size_encoder", region["size_feat_dim"], dim)
    for name, bins in (("coord_decoder", "coord_out_dim"), ("size_decoder", "size_out_dim")):
        linear(f"region.{name}.fc1", dim, region["inner_dim"])
        linear(f"region.{name}.fc2", region["inner_dim"], region[bins])
    return tensors


def older_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names (and the one transposition) of the older layout."""
    older = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        for pattern, replacement in _OLDER:
            renamed, count = re.subn("^" + pattern, replacement, short)
            if count:
                break
        else:
            raise AssertionError(short)
        older[renamed] = tensor.t().contiguous() if short.endswith("_features") else tensor
    return older


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    sections: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write config.json and model.safetensors; keyword arguments go to the top level of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = sections or SECTIONS
    top = {"architectures": ["HfMoondream"], "model_type": "moondream1", "config": chosen, **config}
    (folder / "config.json").write_text(json.dumps(top))
    save_file(random_tensors(chosen) if tensors is None else tensors, folder / "model.safetensors")
    return folder
