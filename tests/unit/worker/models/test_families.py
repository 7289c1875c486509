"""Every family of dense decoders beside transformers, on tiny random checkpoints that transformers wrote.

One row of the table a kind of model. Each is checked in fp32 to 1e-4: a prompt whole and in chunks, 64 greedy tokens
through pages, batches of rows and chunks, and the older spelling of config.json.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.worker.models import dense_oracle as dense
from tests.unit.worker.models import flex_oracle, free_oracle, picture_oracle
from tests.unit.worker.models.dense_oracle import LLAMA3_ROPE, edit_config, load, respell, write
from tests.unit.worker.models.paged_driver import Driver, relative_error
from worker.formats.source import CheckpointError
from worker.models.dense import Dense
from worker.models.registry import FAMILIES, nearest
from worker.native.products import products

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * pair for pair in range(6)],
    "long_factor": [2.0 + 0.7 * pair for pair in range(6)],
    "partial_rotary_factor": 0.75,
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

# Family, and its settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama sharded": ("llama", {"shard_size": "60KB"}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one head each": ("llama", {"num_key_value_heads": 6, "head_dim": None, "hidden_size": 96}),
    "llama one key head": ("llama", {"num_key_value_heads": 1}),
    "llama linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.5}},
    ),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama yarn rope": ("llama", {"rope_parameters": YARN}),
    "llama yarn rope, all set": (
        "llama",
        {
            "rope_parameters": YARN
            | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}
        },
    ),
    "llama yarn rope, scores": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "llama dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2 tied, upper layers slide": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
    ),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 biased": ("qwen3", {"attention_bias": True}),
    "qwen3 slides": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe some layers dense": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "qwen3_moe one expert a token": (
        "qwen3_moe",
        {"mlp_only_layers": [0], "num_experts": 5, "num_experts_per_tok": 1, "num_key_value_heads": 6},
    ),
    "mistral": ("mistral", {}),
    "mistral slides": ("mistral", {"sliding_window": 12}),
    "mistral three keys": ("mistral", {"sliding_window": 3}),
    "mistral a page": ("mistral", {"sliding_window": 16}),
    "ministral": (
        "ministral",
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "smollm3": ("smollm3", {}),
    "smollm3 slides": ("smollm3", {"use_sliding_window": True, "sliding_window": 12}),
    "phi3": ("phi3", {}),
    "phi3 slides": ("phi3", {"sliding_window": 12}),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": ("gemma2", {}),
    "gemma2 other scale": ("gemma2", {"query_pre_attn_scalar": 24, "final_logit_softcapping": None}),
    "gemma3": ("gemma3", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "gemma3 two ropes": (
        "gemma3",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": TWO_ROPES,
            "tie_word_embeddings": False,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 grouped": ("olmo2", {"num_key_value_heads": 3, "attention_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
        },
    ),
    "granite biased": (
        "granite",
        {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5, "tie_word_embeddings": True},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm 12b": (
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "lfm2": ("lfm2", {}),
    "lfm2 untied, biased": ("lfm2", {"tie_word_embeddings": False, "conv_bias": True}),
    "lfm2 long convolutions": (
        "lfm2",
        {"conv_L_cache": 6, "block_auto_adjust_ff_dim": False, "layer_types": None, "full_attn_idxs": [0, 3]},
    ),
    "lfm2 two taps": ("lfm2", {"conv_L_cache": 2, "block_ffn_dim_multiplier": 1.3}),
    "lfm2 attention alone": ("lfm2", {"layer_types": ["full_attention"] * 5}),
    "stablelm half": ("stablelm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
}

Pair = tuple[Any, Any]


@pytest.fixture(scope="module", params=VARIANTS)
def folder_and_oracle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    family, settings = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("family")
    oracle = write(folder, family, **settings)
    assert "shard_size" not in settings or len(list(folder.glob("*.safetensors"))) > 3
    return folder, oracle


@pytest.fixture(scope="module")
def pair(folder_and_oracle: tuple[Path, Any]) -> Pair:
    folder, oracle = folder_and_oracle
    return load(folder), oracle


@pytest.mark.slow
def test_prefill_whole_and_in_chunks(pair: Pair) -> None:
    dense.check_prefill(*pair)


@pytest.mark.slow
def test_greedy_tokens_through_pages(pair: Pair) -> None:
    dense.check_greedy(*pair)


@pytest.mark.slow
def test_batches_of_rows_and_chunks(pair: Pair) -> None:
    dense.check_batch(*pair)


@pytest.mark.slow
def test_the_hubs_spelling_says_the_same(folder_and_oracle: tuple[Path, Any], tmp_path: Path) -> None:
    folder, oracle = folder_and_oracle
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    ids = dense.draw(40, 3)
    model = load(respell(tmp_path))
    _, hidden = Driver(model).prefill(model.embed(torch.tensor(ids)), 0)
    error = relative_error(model.logits(hidden), dense.oracle_logits(oracle, ids))
    assert error < dense.TOLERANCE


@pytest.mark.slow
def test_long_factors_where_a_longer_context_is_asked_for(tmp_path: Path) -> None:
    """transformers takes the long factors for a sequence beyond the original context, and so does this server for
    all of them: positions in its cache must not depend on what comes later."""
    rope: dict[str, Any] = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
    oracle = write(tmp_path, "phi3", **rope)
    assert load(tmp_path).card.context_tokens == 16
    edit_config(tmp_path, degas={"context_tokens": 200})
    model = load(tmp_path)
    assert model.card.context_tokens == 200
    dense.check_prefill(model, oracle)
    dense.check_greedy(model, oracle)


def test_the_documents_say_same_tokens_of_the_families_that_are_tested_here() -> None:
    docs = (Path(__file__).resolve().parents[4] / "docs" / "models.md").read_text()
    said = {
        architecture: cells[2].strip().startswith("yes")
        for line in docs.splitlines()
        if line.startswith("| ") and "`" in (cells := line.strip("|").split("|"))[1]
        for architecture in re.findall(r"`(\w+)`", cells[1])
    }
    tested = {family for family, _ in VARIANTS.values()} | {
        name.split()[0] for name in (*picture_oracle.FAMILIES, *free_oracle.FREE, *flex_oracle.FLEX)
    }
    served = {
        architecture: family.name.removesuffix("_text") in tested
        for family in FAMILIES
        for architecture in family.architectures
    }
    assert said == served


def test_gemma3_as_released_folders_spell_it(tmp_path: Path) -> None:
    """Without `layer_types`: of every `sliding_window_pattern` layers the last attends to all."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    oracle = write(tmp_path, "gemma3", layer_types=kinds)
    respell(tmp_path)
    edit_config(tmp_path, layer_types=None, sliding_window_pattern=2, _sliding_window_pattern=None)
    ids = dense.draw(40, 3)
    model = load(tmp_path)
    _, hidden = Driver(model).prefill(model.embed(torch.tensor(ids)), 0)
    assert relative_error(model.logits(hidden), dense.oracle_logits(oracle, ids)) < dense.TOLERANCE


@pytest.mark.parametrize(
    ("family", "settings", "one_call"),
    [
        ("qwen2", {}, True),
        ("granite", {"residual_multiplier": 0.5, "attention_multiplier": 0.1}, True),
        ("phi3", {}, True),
        ("mistral", {}, True),
        ("mistral", {"sliding_window": 256}, True),  # as wide as the context
        ("mistral", {"sliding_window": 255}, True),
        ("smollm3", {}, False),
        ("gemma3", {}, False),
        ("olmo2", {}, False),
        ("stablelm", {}, False),
    ],
    ids=str,
)
def test_which_families_are_one_compiled_call(
    family: str, settings: dict[str, Any], one_call: bool, tmp_path: Path
) -> None:
    compiled = products(torch.device("cpu"))
    if compiled is None or not compiled.multiplies(torch.float32):
        pytest.skip("no compiled products on this machine")
    write(tmp_path, family, **settings)
    model = load(tmp_path)
    assert isinstance(model, Dense)
    assert (model._stack is not None) == one_call


def test_a_base_models_folder_without_the_prefix(tmp_path: Path) -> None:
    """Saved as the model without its head, tensors are called `layers.0…`, not `model.layers.0…`."""
    oracle = write(tmp_path, "llama", tie_word_embeddings=True)
    hidden = torch.randn(2, dense.SIZES["hidden_size"])
    expected = load(tmp_path).logits(hidden)
    oracle.model.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    assert torch.equal(load(tmp_path).logits(hidden), expected)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["Qwen2MoeForCausalLM", "qwen2_moe"], "Qwen 2 and 2.5"),
        (["Qwen2VLForConditionalGeneration"], "Qwen 2 and 2.5"),
        (["Qwen3VLMoeForConditionalGeneration"], "Qwen3-VL (dense"),
        (["Gemma3ForConditionalGeneration", "gemma3"], "Gemma 3"),
        (["GraniteMoeForCausalLM"], "Granite 3"),
        (["Phi3SmallForCausalLM"], "Phi-3"),
        (["Mistral3ForConditionalGeneration"], "Mistral"),
        (["Llama4ForCausalLM"], "Llama 2 and 3"),
        (["Olmo3ForCausalLM"], "OLMo 2"),
        (["BertModel"], None),
        ([], None),
    ],
    ids=str,
)
def test_the_nearest_family(named: list[str], expected: str | None) -> None:
    found = nearest(named)
    assert found is None if expected is None else found is not None and found.title.startswith(expected)


def test_a_refusal_says_what_is_served_in_words_people_know(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    edit_config(tmp_path, architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "config.json") in text and "Qwen2MoeForCausalLM" in text
    assert "the nearest family that is served is Qwen 2 and 2.5" in text
    for words in ("Llama 2 and 3", "SmolLM2", "Mistral", "Gemma 3", "Phi-4-mini", "OLMo 2", "Moondream 2"):
        assert words in text


def test_a_copy_of_the_known_class_is_not_needed_and_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "phi3")
    edit_config(
        tmp_path, auto_map={"AutoConfig": "c.X", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    )
    assert load(tmp_path).card.family == "phi3"
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_phi3.Other"})
    with pytest.raises(CheckpointError, match="never run"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "settings", "asked", "served"),
    [
        ("llama", {}, None, 256),
        ("llama", {}, 100, 100),
        ("llama", {}, 1000, 256),
        ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": 256}}, None, 256),
        ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": 256}}, 1000, 1000),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 1000, 256),
    ],
    ids=str,
)
def test_the_context_is_the_models(
    family: str, settings: dict[str, Any], asked: int | None, served: int, tmp_path: Path
) -> None:
    write(tmp_path, family, **settings)
    if asked is not None:
        edit_config(tmp_path, degas={"context_tokens": asked})
    assert load(tmp_path).card.context_tokens == served


def test_ends_are_those_of_both_files(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    edit_config(tmp_path, eos_token_id=9)
    said = {"eos_token_id": [5, 2], "repetition_penalty": 1.1, "min_p": 0.05, "bos_token_id": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    card = load(tmp_path).card
    assert card.eos_ids == [5, 2, 9] and card.bos_id == 1
    assert (card.default_repetition_penalty, card.default_min_p) == (1.1, 0.05)
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"repetition_penalty": -1}))
    with pytest.raises(CheckpointError, match="'repetition_penalty' is -1; it lies in"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "need 6 numbers each"),
        ("phi3", {"rope_parameters": LONGROPE | {"short_factor": None}}, "'short_factor' is missing"),
        (
            "stablelm",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.2}},
            "turns 3 dimensions",
        ),
        ("smollm3", {"no_rope_layers": [1]}, "'no_rope_layers' is not a list of 3"),
        ("gemma3", {"use_bidirectional_attention": True}, "encoder"),
        (
            "gemma2",
            {"query_pre_attn_scalar": 0},
            "'query_pre_attn_scalar' is 0; a number above 0 is expected",
        ),
        ("mistral", {"sliding_window": 0}, "'sliding_window'"),
        ("granite", {"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "'num_experts_per_tok' is 7, and there are 6 experts"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "'mlp_only_layers' is"),
        ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}, "supported is silu"),
    ],
    ids=str,
)
def test_refusals(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, family)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
