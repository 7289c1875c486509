"""The shipped weights answer a handful of unseen scenes. Test process."""

import json

import pytest
from safetensors import safe_open

from pocket.answerer import TorchAnswerer
from pocket.evaluate import evaluate
from pocket.network import Network, NetworkConfig
from pocket.train import POCKET, WEIGHTS_FOLDER


def test_layout_is_the_released_one() -> None:
    released = json.loads((WEIGHTS_FOLDER / "config.json").read_text())
    assert released["architectures"] == ["HfMoondream"]
    assert released["model_type"] == "moondream1"
    config = NetworkConfig.read(WEIGHTS_FOLDER / "config.json")
    assert config == POCKET
    expected = {f"model.{name}": list(held.shape) for name, held in Network(config).state_dict().items()}
    with safe_open(WEIGHTS_FOLDER / "model.safetensors", "pt") as held:
        assert {name: held.get_slice(name).get_shape() for name in held.keys()} == expected  # noqa: SIM118
    assert (WEIGHTS_FOLDER / "model.safetensors").stat().st_size < 9_000_000


@pytest.mark.slow
def test_unseen_scenes_are_answered() -> None:
    figures = evaluate(TorchAnswerer(WEIGHTS_FOLDER), num_scenes=6, seed=424_242)
    assert figures["exact"] >= 0.8
    assert figures["iou"] >= 0.6
    assert figures["point"] >= 0.7
