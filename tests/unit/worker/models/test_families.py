"""Every family of dense decoders beside transformers, on tiny random checkpoints that transformers wrote.

One row of the table a kind of model. Each is checked in fp32 to 1e-4: a prompt whole and in chunks, 64 greedy tokens
through pages, batches of rows and chunks, and the older spelling of config.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.worker.models import dense_oracle as dense
from tests.unit.worker.models.dense_oracle import LLAMA3_ROPE, edit_config, load, respell, write

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
    _, hidden = dense.Driver(model).prefill(model.embed(torch.tensor(ids)), 0)
    error = dense.relative_error(model.logits(hidden), dense.oracle_logits(oracle, ids))
    assert error < dense.TOLERANCE


@pytest.mark.slow
def test_long_factors_where_a_longer_context_is_asked_for(tmp_path: Path) -> None:
    """transformers takes the long factors for a sequence beyond the original context, and so does this server for
    all of them: positions in its cache must not depend on what comes later."""
    rope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
    oracle = write(tmp_path, "phi3", **rope)
    assert load(tmp_path).card.context_tokens == 16
    edit_config(tmp_path, degas={"context_tokens": 200})
    model = load(tmp_path)
    assert model.card.context_tokens == 200
    dense.check_prefill(model, oracle)
    dense.check_greedy(model, oracle)


def test_gemma3_as_released_folders_spell_it(tmp_path: Path) -> None:
    """Without `layer_types`: of every `sliding_window_pattern` layers the last attends to all."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    oracle = write(tmp_path, "gemma3", layer_types=kinds)
    respell(tmp_path)
    edit_config(tmp_path, layer_types=None, sliding_window_pattern=2, _sliding_window_pattern=None)
    ids = dense.draw(40, 3)
    model = load(tmp_path)
    _, hidden = dense.Driver(model).prefill(model.embed(torch.tensor(ids)), 0)
    assert dense.relative_error(model.logits(hidden), dense.oracle_logits(oracle, ids)) < dense.TOLERANCE
