"""Loading holds the weights once: the most memory on the way is the weights and a tenth, in every kind of weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worker.native.library import load

# In a process of its own: what others have touched before would hide the peak, and glibc's settings are a process's.
PROBE = """
import sys, torch
from pathlib import Path
from worker.device.cpu import CpuDevice, giving_back
from worker.formats.open_source import open_source
from worker.models.held import held_bytes
from worker.models.registry import load_model
from worker.native.library import use_threads
from worker.native.quantised_source import QuantisedSource

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

folder, kind = Path(sys.argv[1]), sys.argv[2]
device = CpuDevice()
use_threads(1)
source = open_source(folder)
if kind.startswith("int"):
    source = QuantisedSource(source, kind, folder / "kept")
dtype = torch.bfloat16 if kind == "bf16" else torch.float32
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
with giving_back(), torch.inference_mode():
    model = load_model(source, device.torch_device, dtype, lambda *_: None)
print(held_bytes(model), status("VmHWM") - before)
"""
MARGIN = 40 << 20  # what reading, rounding and packing work with, however large the model is


def write_llama(folder: Path, *, dim: int, layers: int, vocab: int) -> Path:
    """A Llama of random numbers in bf16, in two files with an index."""
    folder.mkdir(exist_ok=True)
    numbers = (torch.randn(1 << 18, generator=torch.Generator().manual_seed(3)) * 0.05).bfloat16()

    def put(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return numbers.repeat(-(-count // len(numbers)))[:count].reshape(shape).clone()

    ff, names = 2 * dim, ("input_layernorm", "post_attention_layernorm")
    first = {"model.embed_tokens.weight": put(vocab, dim), "lm_head.weight": put(vocab, dim)}
    second = {"model.norm.weight": torch.ones(dim).bfloat16()}
    for index in range(layers):
        layer = f"model.layers.{index}"
        second |= {f"{layer}.{name}.weight": torch.ones(dim).bfloat16() for name in names}
        second |= {f"{layer}.self_attn.{part}_proj.weight": put(dim, dim) for part in "qkvo"}
        second |= {f"{layer}.mlp.{part}_proj.weight": put(ff, dim) for part in ("gate", "up")}
        second[f"{layer}.mlp.down_proj.weight"] = put(dim, ff)
    shards: dict[str, str] = {}
    for number, tensors in enumerate((first, second), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(tensors, folder / name)
        shards |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": dim // 64,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), dim=768, layers=6, vocab=24000)  # 145 MB


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp32", "int8"])
def test_the_peak_is_the_weights(folder: Path, kind: str) -> None:
    if load() is None or not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs the compiled products, and Linux")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), kind], capture_output=True, text=True, check=True
    )
    held, peak = map(int, done.stdout.splitlines()[-1].split())  # behind what it logs
    assert peak < 1.1 * held + MARGIN
    # bf16 is kept as it was saved, whatever activations are; eight bits take a scale for 32 of them.
    saved = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert held < (1.02 * saved if kind != "int8" else 0.75 * saved)
