"""Checkpoints that are not what they say are refused by name; those that are, load in either layout."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.protocol import OverlappingTiles
from tests.unit.worker.models.paged_driver import GOLDEN, quiet
from tests.unit.worker.models.small_checkpoint import SECTIONS, older_layout, random_tensors, write_checkpoint
from worker.formats.open_source import open_source
from worker.formats.safetensors import Checkpoint
from worker.formats.source import CheckpointError
from worker.models.moondream import Moondream
from worker.models.registry import load_model

CPU = torch.device("cpu")
FC1 = "model.text.blocks.1.mlp.fc1.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Moondream:
    model = load_model(open_source(folder), CPU, dtype, quiet)
    assert isinstance(model, Moondream)
    return model


def refuse(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return caught.value


def outputs(model: Moondream) -> torch.Tensor:
    ids = torch.arange(8)
    return torch.cat(
        [model.logits(model.embed(ids)), model.region.coordinate_logits(model.embed(ids))], dim=1
    )


def test_progress_runs_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[str, float, float]] = []
    model = load_model(
        open_source(write_checkpoint(tmp_path)),
        CPU,
        torch.bfloat16,
        lambda *args: seen.append((args[0], args[1], args[2])),
    )
    phases, done, totals = zip(*seen, strict=True)
    assert set(phases) == {"weights"} and list(done) == sorted(done)
    assert done[-1] == totals[-1] == sum(t.nbytes for t in random_tensors().values())
    assert totals[-1] / 2 <= model.weight_bytes < totals[-1] / 2 + 1000  # Fourier frequencies stay fp32


def test_older_layout_equals_released_layout(tmp_path: Path) -> None:
    tensors = random_tensors()
    old = older_layout(tensors)
    old["text_model.transformer.h.0.mixer.rotary_emb.inv_freq"] = torch.ones(4)
    want = load(write_checkpoint(tmp_path / "new", tensors))
    found = load(write_checkpoint(tmp_path / "old", old))
    assert torch.equal(outputs(found), outputs(want))
    value = torch.tensor([[0.25, 0.5]])
    assert torch.equal(
        found.region.encode_size(value, torch.float32), want.region.encode_size(value, torch.float32)
    )
    mixed = {name: tensor for name, tensor in tensors.items() if ".region." not in name}
    mixed |= {
        name.replace("region_model.", "model.region."): tensor
        for name, tensor in old.items()
        if name.startswith("region_model.")
    }
    mixed_model = load(write_checkpoint(tmp_path / "mixed", mixed))
    assert torch.equal(
        mixed_model.region.encode_size(value, torch.float32), want.region.encode_size(value, torch.float32)
    )
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert torch.equal(outputs(load(write_checkpoint(tmp_path / "bare", bare))), outputs(want))


def test_half_precision_files(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in random_tensors().items()}
    want = load(write_checkpoint(tmp_path / "a", {name: t.float() for name, t in tensors.items()}))
    assert torch.equal(outputs(load(write_checkpoint(tmp_path / "b", tensors))), outputs(want))


def test_missing_tensor(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors[FC1]
    error = refuse(write_checkpoint(tmp_path, tensors))
    assert error.tensor == "text.blocks.1.mlp.fc1.weight" and error.expected == (192, 128)
    assert "missing" in str(error) and str(tmp_path) in str(error)


def test_misshapen_tensor(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[FC1] = tensors[FC1][:100].contiguous()
    error = refuse(write_checkpoint(tmp_path, tensors))
    assert (error.tensor, error.expected, error.found) == (FC1, (192, 128), (100, 128))
    assert error.file == tmp_path / "model.safetensors"


def test_unknown_tensor(tmp_path: Path) -> None:
    tensors = random_tensors() | {"model.text.blocks.7.ln.weight": torch.ones(4)}
    assert "model.text.blocks.7.ln.weight" in str(refuse(write_checkpoint(tmp_path, tensors)))


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["text_model.lm_head.linear.bias"] = torch.zeros(96)
    assert "stored twice" in str(refuse(write_checkpoint(tmp_path, tensors)))


def test_integer_weights(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[FC1] = tensors[FC1].to(torch.int8)
    assert "I8 weights" in str(refuse(write_checkpoint(tmp_path, tensors)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "header"),
        (b"\x80\x02}q\x00.", "header"),
        (struct.pack("<Q", 1 << 60) + b"{}", "header"),
        (struct.pack("<Q", 2) + b"[]", "header"),
        (struct.pack("<Q", 4) + b"nope", "header"),
        (struct.pack("<Q", 9) + b'{"a":1}  ', "header"),
    ],
)
def test_no_safetensors_at_all(tmp_path: Path, content: bytes, said: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    error = refuse(tmp_path)
    assert said in str(error) and error.file == tmp_path / "model.safetensors"


def test_truncated_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in str(refuse(tmp_path))


def test_overlong_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    assert "not a whole safetensors file" in str(refuse(tmp_path))


def test_pickles_are_refused(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickle" in str(refuse(tmp_path))


def test_empty_folder_and_missing_folder(tmp_path: Path) -> None:
    assert "no config.json" in str(refuse(tmp_path))
    assert "no such file or folder" in str(refuse(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"architectures": ["HfMoondream"]}')
    assert "no model.safetensors" in str(refuse(tmp_path))


def split(folder: Path) -> dict[str, Any]:
    tensors = random_tensors()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    return {"metadata": {}, "weight_map": weight_map}


def test_shards(tmp_path: Path) -> None:
    whole = load(write_checkpoint(tmp_path / "whole"))
    folder = write_checkpoint(tmp_path / "split")
    index_path = folder / "model.safetensors.index.json"
    index = split(folder)
    assert "2 safetensors files and no index" in str(refuse(folder))
    index_path.write_text(json.dumps(index))
    assert torch.equal(outputs(load(folder)), outputs(whole))
    index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {"extra": "model-0.safetensors"}}))
    assert "named by the index only" in str(refuse(folder))
    for bad in ("../model-0.safetensors", "model-0.bin", 7):
        index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {FC1: bad}}))
        assert "no safetensors file of this folder" in str(refuse(folder))
    index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {FC1: "model-0.safetensors"}}))
    assert FC1 in str(refuse(folder))
    (folder / "model-1.safetensors").rename(folder / "model-2.safetensors")
    index_path.write_text(json.dumps(index))
    assert "no such file" in str(refuse(folder))
    index_path.write_text("{}")
    assert "no weight_map" in str(refuse(folder))


def test_taken_tensors_outlive_the_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    checkpoint = Checkpoint(folder, quiet)
    name = "model.text.lm_head.bias"
    tensor = checkpoint.take(name, 96, device=CPU, dtype=torch.float32)
    assert name in checkpoint and "other" not in checkpoint
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(tensor, random_tensors()[name])
    with pytest.raises(CheckpointError, match="does not know"):
        checkpoint.finish()


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("text", {"moe": {"num_experts": 64}}, "text.moe"),
        ("text", {"group_size": 128}, "quantised"),
        ("text", {"window": 3}, "unknown setting 'text.window'"),
        ("text", {"dim": "128"}, "whole number"),
        ("text", {"n_heads": 3}, "text.n_heads"),
        ("text", {"n_layers": 0}, "at least 1"),
        ("text", {"max_context": 20}, "no room"),
        ("vision", {"crop_size": 71}, "whole patches"),
        ("vision", {"overlap_margin": 3}, "leaves nothing"),
        ("region", {"dim": 64}, "must agree"),
        ("tokenizer", {"templates": {"query": {"prefix": "hello", "suffix": [3]}}}, "list of token ids"),
    ],
)
def test_configurations_that_cannot_run(
    tmp_path: Path, section: str, change: dict[str, Any], said: str
) -> None:
    sections = SECTIONS | {section: SECTIONS.get(section, {}) | change}
    write_checkpoint(tmp_path)
    top = {"architectures": ["HfMoondream"], "config": sections}
    (tmp_path / "config.json").write_text(json.dumps(top))
    error = refuse(tmp_path)
    assert said in str(error) and error.file == tmp_path / "config.json"


def test_null_means_unused(tmp_path: Path) -> None:
    sections = SECTIONS | {"text": SECTIONS["text"] | {"moe": None, "group_size": None}}
    tensors = random_tensors()
    write_checkpoint(tmp_path, tensors)
    top = {"architectures": ["HfMoondream"], "config": sections}
    (tmp_path / "config.json").write_text(json.dumps(top))
    load(tmp_path)


def test_unknown_architecture(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, architectures=["OtherModel"], model_type="other", auto_map={"AutoModel": "x.Y"}
    )
    text = str(refuse(tmp_path))
    assert "OtherModel, other" in text and "Moondream 2" in text and "never run" in text


def test_code_beside_a_known_architecture_is_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, auto_map={"AutoModelForCausalLM": "hf_moondream.HfMoondream"})
    (tmp_path / "hf_moondream.py").write_text("raise SystemExit(1)\n")
    load(tmp_path)


def test_card(tmp_path: Path) -> None:
    described = {"model_id": "degas-pocket", "description": "small"}
    card = load(write_checkpoint(tmp_path / "pocket" / "weights", degas=described)).card
    assert (card.model_id, card.description, card.family) == ("degas-pocket", "small", "moondream")
    assert card.capabilities == ["chat", "query", "caption", "detect", "point"]
    assert card.image is not None
    assert card.image.rule == OverlappingTiles(patch_size=14, margin_patches=1, max_crops=4)
    assert (card.image.crop_size, card.image.crop_tokens, card.context_tokens) == (70, 25, 256)
    assert (card.bos_id, card.eos_ids, card.suppress_ids) == (0, [0], [3])
    assert card.templates == {
        "caption_short": [1, 32708, 2, 12492, 3],
        "caption_normal": [1, 32708, 2, 6382, 3],
        "caption_long": [1, 32708, 2, 4059, 3],
        "query_prefix": [1, 15381, 2],
        "query_suffix": [3, 3],
        "reasoning_suffix": [3, 4],
        "reasoning_end": [3],
        "reasoning_suppress": [0, 6],
        "reasoning_close": [3],
        "reasoning_cuts": [7, 9],
        "detect_prefix": [1, 7235, 476, 2],
        "detect_suffix": [3],
        "point_prefix": [1, 2581, 2],
        "point_suffix": [3],
    }
    assert load(write_checkpoint(tmp_path / "pocket" / "weights")).card.model_id == "pocket"
    assert load(write_checkpoint(tmp_path / "mine")).card.model_id == "mine"


def test_templates_of_the_golden_checkpoint() -> None:
    model = load(GOLDEN)
    assert model.card.templates["query_prefix"] == [1, 44, 2]
    assert model.card.templates["query_suffix"] == [3, 3]
    assert model.prefix_tokens == 730
