"""Owns small random Moondream 3 checkpoints: the newer layout of names, and the older with its experts in FP8."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.unit.worker.models.small_checkpoint import SECTIONS, older_layout, random_tensors

EXPERTS = {"num_experts": 8, "start_layer": 1, "experts_per_token": 3, "expert_inner_dim": 32}
SECTIONS_3: dict[str, Any] = copy.deepcopy(SECTIONS)
SECTIONS_3["text"] |= {"n_layers": 3, "max_context": 512, "moe": EXPERTS, "n_heads": 4, "n_kv_heads": 4}
del SECTIONS_3["region"]["inner_dim"]

_OLDER = (
    (r"(text_model\.transformer\.h\.\d+\.)attn\.tau\.", r"\1tau_"),
    (r"(text_model\.transformer\.h\.\d+\.)mlp\.router\.", r"\1gate."),
    (r"region_model\.coordinate_decoder\.", "region_model.coordinate_head."),
    (r"region_model\.size_decoder\.", "region_model.size_head."),
)


def random_tensors_3(sections: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of these sizes, by its name in the newer layout, fp32."""
    chosen = sections or SECTIONS_3
    text, region = chosen["text"], chosen["region"]
    tensors = random_tensors({**chosen, "region": {"inner_dim": 8, **region}})
    generator = torch.Generator().manual_seed(12)

    def put(name: str, *shape: int, scale: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if scale is None else scale
        tensors[f"model.{name}"] = torch.randn(shape, generator=generator) * spread

    for name in ("coord", "size"):
        for layer in ("fc1", "fc2"):
            for part in ("weight", "bias"):
                del tensors[f"model.region.{name}_decoder.{layer}.{part}"]
        put(f"region.{name}_decoder.weight", region[f"{name}_out_dim"], region["dim"])
        put(f"region.{name}_decoder.bias", region[f"{name}_out_dim"], scale=0.1)
    put("region.ln.weight", region["dim"])
    tensors["model.region.ln.weight"] += 1
    put("region.ln.bias", region["dim"], scale=0.1)
    dim, experts = text["dim"], text["moe"]
    for index in range(text["n_layers"]):
        name = f"text.blocks.{index}"
        put(f"{name}.attn.tau.wq", text["n_heads"], 3 * dim)
        put(f"{name}.attn.tau.wv", text["n_heads"], 3 * dim)
        put(f"{name}.attn.tau.alpha", text["n_heads"], scale=1.0)
        if index < experts["start_layer"]:
            continue
        for layer in ("fc1", "fc2"):
            for part in ("weight", "bias"):
                del tensors[f"model.{name}.mlp.{layer}.{part}"]
        number, inner = experts["num_experts"], experts["expert_inner_dim"]
        put(f"{name}.mlp.router.weight", number, dim, scale=1.5 * dim**-0.5)
        put(f"{name}.mlp.router.bias", number, scale=0.5)
        put(f"{name}.mlp.fc1.weight", number, 2 * inner, dim)
        put(f"{name}.mlp.fc2.weight", number, dim, inner)
    return tensors


def older_layout_3(tensors: dict[str, Tensor], *, fp8: bool, joined: bool = False) -> dict[str, Tensor]:
    """The same tensors under the names of 3.1's file. `fp8`: the experts rounded to e4m3 with a scale a row; `joined`: the two
    weights of the scaled attention as one."""
    older: dict[str, Tensor] = {}
    for stored, tensor in older_layout(tensors).items():
        name = stored
        for pattern, replacement in _OLDER:
            name = re.sub("^" + pattern, replacement, name)
        if tensor.dim() == 3 and ".mlp." in name:
            which = "up" if ".fc1." in name else "down"
            name = name.replace("fc1", "experts").replace("fc2", "output_experts")
            if fp8:
                scale = tensor.abs().amax(-1) / 448.0
                older[re.sub(r"mlp\..*", f"moe_quant.{which}_scale", name)] = scale
                tensor = (tensor / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
        older[name] = tensor
    if joined:
        for name in [name for name in older if name.endswith("tau_wq")]:
            stem = name.removesuffix("wq")
            older[f"{stem}wqwv"] = torch.cat([older.pop(name), older.pop(f"{stem}wv")])
    return older


def write_checkpoint_3(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    sections: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write config.json and model.safetensors; keyword arguments replace the top level of config.json but `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = sections or SECTIONS_3
    named = config or {"architectures": ["HfMoondream"], "model_type": "moondream3"}
    (folder / "config.json").write_text(json.dumps({"config": chosen, **named}))
    save_file(random_tensors_3(chosen) if tensors is None else tensors, folder / "model.safetensors")
    return folder
