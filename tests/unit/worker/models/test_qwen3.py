"""The dense Qwen3 family beside transformers, on tiny random checkpoints that transformers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.worker.models import dense_oracle as dense
from tests.unit.worker.models.dense_oracle import edit_config, load, write
from worker.formats.source import CheckpointError

VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "sharded": {"shard_size": "60KB", "tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "quick rotations": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("qwen3")
    oracle = write(folder, "qwen3", **VARIANTS[request.param])
    return load(folder), oracle


@pytest.mark.slow
def test_prefill_whole_and_in_chunks(pair: tuple[Any, Any]) -> None:
    dense.check_prefill(*pair)


@pytest.mark.slow
def test_greedy_tokens_through_pages(pair: tuple[Any, Any]) -> None:
    dense.check_greedy(*pair)


@pytest.mark.slow
def test_batches_of_rows_and_chunks(pair: tuple[Any, Any]) -> None:
    dense.check_batch(*pair)


def test_card_and_head_width(tmp_path: Path) -> None:
    write(tmp_path, "qwen3", head_dim=128, num_attention_heads=2, num_key_value_heads=1)
    edit_config(tmp_path, head_dim=None)
    model = load(tmp_path)
    assert model.head_dim == 128, "Qwen3's default, not hidden_size / heads"
    assert (model.card.family, model.card.model_id) == ("qwen3", tmp_path.name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 32}, "sliding-window"),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
            "unknown architecture Qwen3Moe",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "'model_type' is 'qwen3'"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "does not know: .*k_norm"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, "qwen3")
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
