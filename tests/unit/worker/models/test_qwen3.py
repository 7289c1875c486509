"""What a dense Qwen 3's folder says that a Llama's does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.worker.models.dense_oracle import edit_config, load, write
from worker.formats.source import CheckpointError


def test_card_and_head_width(tmp_path: Path) -> None:
    write(tmp_path, "qwen3", head_dim=128, num_attention_heads=2, num_key_value_heads=1)
    edit_config(tmp_path, head_dim=None)
    model = load(tmp_path)
    assert model.head_dim == 128, "Qwen3's default, not hidden_size / heads"
    assert (model.card.family, model.card.model_id) == ("qwen3", tmp_path.name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "full_attention", "linear_attention"]}, "sliding-window"),
        ({"use_sliding_window": True, "layer_types": ["full_attention", "x", "x"]}, "'layer_types' has 'x'"),
        (
            {"architectures": ["Qwen3OmniForCausalLM"], "model_type": "qwen3_omni"},
            "unknown architecture Qwen3Omni",
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
