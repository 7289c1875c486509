"""The training forward against the reference implementation's own numbers. Test process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pocket.network import MASKED, Network, NetworkConfig, size_value
from pocket.objective import attention_mask
from pocket.tiling import choose_tiling, cut_crops

GOLDEN = Path(__file__).parents[2] / "data" / "golden_moondream"
TOLERANCE = 1e-4


def differ(ours: Tensor, theirs: Any) -> float:
    """Largest difference, relative to the largest value where that is above one."""
    expected = torch.as_tensor(np.asarray(theirs), dtype=torch.float32)
    scale = max(1.0, float(expected.abs().max()))
    return float((ours.float() - expected).abs().max()) / scale


@pytest.fixture(scope="module")
def numbers() -> Any:
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    made = Network(NetworkConfig.read(GOLDEN / "config.json"))
    weights = load_file(GOLDEN / "model.safetensors")
    made.load_state_dict({name.removeprefix("model."): held for name, held in weights.items()})
    with torch.inference_mode():
        yield made


def hidden_after(network: Network, embeddings: Tensor, num_prefix: int) -> Tensor:
    """Hidden states (T, dim) of one sequence of embeddings."""
    length = embeddings.shape[0]
    mask = torch.full((length, length), MASKED).triu(1)
    mask[:num_prefix, :num_prefix] = 0
    return network.text.decode(embeddings[None], torch.arange(length)[None], mask[None, None])[0]


def test_tilings() -> None:
    rows = json.loads((GOLDEN / "tilings.json").read_text())
    assert all(choose_tiling(h - 112, w - 112, 266, 12) == (th, tw) for h, w, th, tw in rows)


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 2])
def test_picture_query_and_detect(network: Network, numbers: Any, k: int) -> None:
    def golden(name: str) -> Any:
        return numbers[f"image{k}.{name}"]

    with Image.open(GOLDEN / f"image{k}.png") as opened:
        crops, tiling = cut_crops(opened.convert("RGB"), network.config.vision)
    assert tiling == tuple(golden("tiling"))
    means = torch.from_numpy(crops.reshape(len(crops), -1, 3).mean(1))
    features = network.vision.encode(torch.from_numpy(crops.copy()))
    ours = features[:, ::9]
    if tiling == (1, 1):  # we encode the two equal crops once
        means, ours = means.repeat(2, 1), ours.repeat(2, 1, 1)
    assert differ(means, golden("crop_means")) < TOLERANCE
    assert differ(ours, golden("features_sub")) < TOLERANCE
    image = network.vision.embed(features, [tiling])[0]
    assert differ(image, golden("embedding")) < TOLERANCE

    text, region, num_prefix = network.text, network.region, network.config.num_prefix
    start = torch.cat((text.wte[:1], image))
    ids = np.concatenate([golden("query_tokens"), golden("greedy_ids")])
    hidden = hidden_after(network, torch.cat((start, text.wte[torch.from_numpy(ids)])), num_prefix)
    assert differ(hidden[-25], golden("query_hidden")) < TOLERANCE
    assert differ(text.logits(hidden[-25]), golden("query_logits")) < TOLERANCE
    logits = text.logits(hidden[-24:])
    logits[:, 3] = MASKED  # suppressed while answering
    assert differ(logits[:, 4:], golden("greedy_logits")[:, 4:]) < TOLERANCE

    bins = torch.from_numpy(golden("detect_bins"))
    steps = [start, text.wte[torch.from_numpy(golden("detect_tokens"))]]
    for x, y, *size in bins:
        steps += [region.encode_coordinate(v.view(1, 1) / 1024) for v in (x, y)]
        steps.append(region.encode_size(size_value(torch.stack(size))[None]))
    hidden = hidden_after(network, torch.cat(steps), num_prefix)[-7:]
    assert differ(region.decode_coordinate(hidden[0:6:3]), golden("detect_x")) < TOLERANCE
    assert differ(region.decode_coordinate(hidden[1:6:3]), golden("detect_y")) < TOLERANCE
    assert differ(region.decode_size(hidden[2:6:3]), golden("detect_size")) < TOLERANCE
    assert differ(text.logits(hidden[0:7:3]), golden("detect_next")) < TOLERANCE


def test_text_only(network: Network, numbers: Any) -> None:
    tokens = torch.from_numpy(numbers["text.tokens"])
    hidden = hidden_after(network, network.text.wte[tokens], 0)
    assert differ(network.text.logits(hidden[-1]), numbers["text.logits"]) < TOLERANCE


def test_questions_of_one_row_do_not_see_each_other() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 3, 4, 0]])
    sees = torch.zeros(1, 5, 5, dtype=torch.bool)
    sees[0, 1, 1] = sees[0, 2, 1] = sees[0, 3, 1] = (
        True  # a picture and two questions; the fourth is by itself
    )
    allowed = attention_mask(segments, sees, torch.float32)[0, 0] == 0
    text = allowed[2:, 2:]
    assert allowed[:2, :2].all() and not allowed[:2, 2:].any()
    assert allowed[2:5, :2].all(), "a question sees the picture"
    assert not allowed[5:, :2].any(), "one without a picture does not"
    assert text.tolist()[1] == [True, True, False, False, False]
    assert text.tolist()[2] == [False, False, True, False, False]
