"""What a dense decoder's folder says, by Llama's example: the card, refusals, and numbers that stay apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.worker.models import dense_oracle as dense
from tests.unit.worker.models.dense_oracle import edit_config, load, write
from tests.unit.worker.models.paged_driver import Driver
from worker.formats.source import CheckpointError
from worker.forward import ImageCrops


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "llama")
    return tmp_path


@pytest.mark.slow
def test_bfloat16_stays_near_fp32(tmp_path: Path) -> None:
    oracle = write(tmp_path, "llama")
    model = load(tmp_path, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    ids = dense.draw(40, 4)
    _, hidden = Driver(model, kv_dtype=torch.float32).prefill(model.embed(torch.tensor(ids)), 0)
    expected = dense.oracle_logits(oracle, ids)
    theirs = dense.oracle_logits(oracle.to(torch.bfloat16), ids)
    error = (model.logits(hidden) - expected).abs().mean()
    assert error < 1.2 * (theirs - expected).abs().mean()


def test_nan_stays_in_its_row(folder: Path) -> None:
    model = load(folder)
    driver = Driver(model)
    rows = [driver.prefill(model.embed(torch.tensor(dense.draw(9, seed))), 0)[0] for seed in (1, 2)]
    embedded = model.embed(torch.tensor([7, 8]))
    embedded[0] = float("nan")
    logits = model.logits(driver.step([(row, embedded[i : i + 1]) for i, row in enumerate(rows)]))
    assert torch.isnan(logits[0]).all() and torch.isfinite(logits[1]).all()
    assert all(torch.isfinite(memory).all() for memory in (*driver.cache.keys, *driver.cache.values))


def test_no_pictures_and_no_coordinates(folder: Path) -> None:
    model = load(folder)
    assert model.encode_images([]) == [] and model.prefix_tokens == 0
    crops = ImageCrops([])
    with pytest.raises(RuntimeError, match="text only"):
        model.encode_images([crops])
    with pytest.raises(RuntimeError, match="text only"):
        model.decode_values(torch.zeros(1, 48), torch.zeros(1, dtype=torch.int64))


# ------------------------------------------------------------------ the card


def test_card(folder: Path) -> None:
    edit_config(folder, degas={"model_id": "tiny", "description": "for tests"})
    generation = {
        "bos_token_id": 1,
        "eos_token_id": [5, 2, 5],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    card = load(folder).card
    assert (card.family, card.model_id, card.description) == ("llama", "tiny", "for tests")
    assert (card.bos_id, card.eos_ids, card.vocab_size, card.context_tokens) == (1, [5, 2], 160, 256)
    assert (card.default_temperature, card.default_top_p, card.default_top_k) == (0.6, 0.9, 20)
    assert card.capabilities == ["completions"] and card.image is None


def test_card_without_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, max_position_embeddings=131072, bos_token_id=None, eos_token_id=None)
    model = load(folder)
    assert (model.card.bos_id, model.card.eos_ids) == (None, [])
    assert (model.card.default_temperature, model.card.default_top_p) == (0.0, 1.0)
    assert model.card.default_top_k == 0
    assert model.card.context_tokens == 131072, "the model's own; memory may cut it at start-up"
    edit_config(folder, degas={"context_tokens": 100})
    assert load(folder).card.context_tokens == 100


@pytest.mark.parametrize(
    ("generation", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
    ],
)
def test_default_temperature(folder: Path, generation: dict[str, Any], temperature: float) -> None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load(folder).card.default_temperature == temperature


@pytest.mark.parametrize("top_k", [-1, 1.5, True, "20"])
def test_a_top_k_that_is_none_is_refused(folder: Path, top_k: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"top_k": top_k}))
    with pytest.raises(CheckpointError, match="'top_k' is"):
        load(folder)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
            "unknown architecture MambaForCausalLM",
        ),
        ({"model_type": "granite"}, "'model_type' is 'granite'"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "never run"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ: weights quantised so are not served"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"sliding_window": 64}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "'mrope' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}}, "'low_freq_factor'"),
        ({"partial_rotary_factor": 1.5}, "'partial_rotary_factor' is 1.5"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_attention_heads": 0}, "'num_attention_heads'"),
        ({"num_key_value_heads": 4}, "does not divide into 'num_key_value_heads'"),
        ({"head_dim": 15}, "even one"),
        ({"rms_norm_eps": 0}, "'rms_norm_eps'"),
        ({"tie_word_embeddings": "no"}, "neither true nor false"),
        ({"intermediate_size": 97}, "gate_proj.weight: not of the shape"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight: missing"),
        ({"num_hidden_layers": 2}, "does not know: model.layers.2"),
        ({"attention_bias": True}, "q_proj.bias: missing"),
        ({"degas": {"context_tokens": "all"}}, "'degas.context_tokens'"),
    ],
)
def test_refusals(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_ids_outside_the_vocabulary(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 160]}')
    with pytest.raises(CheckpointError, match="'eos_token_id' is 160"):
        load(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load(folder)


def test_quantised_tensor_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="I8 weights are not supported"):
        load(folder)


def test_tied_embeddings_by_what_is_stored(folder: Path) -> None:
    """A config.json that says nothing of tying: an lm_head in the files is used, else the embeddings are."""
    tensors = load_file(folder / "model.safetensors")
    edit_config(folder, tie_word_embeddings=None)
    hidden = torch.randn(1, 48)
    untied = load(folder)
    edit_config(folder, tie_word_embeddings=True)
    told = load(folder)  # as transformers: a stored lm_head beside tied embeddings is ignored
    assert not torch.equal(untied.logits(hidden), told.logits(hidden))
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, tie_word_embeddings=None)
    assert torch.equal(load(folder).logits(hidden), told.logits(hidden))
    assert told.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        load(folder)
