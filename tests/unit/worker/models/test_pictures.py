"""Families that read pictures beside transformers, on tiny random checkpoints that transformers wrote.

From the file and the conversation to the last token: pixels and ids of the processors, features and logits to 1e-4 in
fp32, and greedy tokens through chunks, batches and both caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gateway.api.prompts import Prompt
from gateway.core.catalog import AnnouncedModel
from tests.unit.worker.models import picture_oracle as pictures
from tests.unit.worker.models.dense_oracle import TOLERANCE, load
from tests.unit.worker.models.paged_driver import Driver, Row, relative_error
from tests.unit.worker.models.picture_oracle import CONVERSATIONS, FAMILIES, Oracle, conversation
from tests.unit.worker.step.test_torch_runner import Harness
from worker.forward import ImageCrops, ImageSheet, segments_of
from worker.models.picture_model import PictureModel
from worker.models.tiling import cut_crops

pytestmark = pytest.mark.slow
NUM = 48


@dataclass
class Pair:
    """A model of ours and of theirs."""

    model: PictureModel
    served: AnnouncedModel
    oracle: Oracle


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.set_num_threads(1)
    with torch.inference_mode():
        oracle = FAMILIES[request.param](folder)
        model = load(folder)
    assert isinstance(model, PictureModel)
    return Pair(model, pictures.announced(model.card, folder), oracle)


def crops_of(prompt: Prompt) -> list[ImageCrops]:
    """A prompt's pictures as the device has them."""
    return [
        ImageCrops(
            [
                ImageSheet(
                    torch.from_numpy(
                        np.frombuffer(frame, np.uint8).reshape(sheet.height, sheet.width, 3).copy()
                    ),
                    sheet.rows,
                    sheet.cols,
                )
                for sheet, frame in zip(image.spec.sheets, image.frames, strict=True)
            ]
        )
        for image in prompt.images
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_pixels_ids_features_and_logits(pair: Pair, name: str) -> None:
    model, oracle = pair.model, pair.oracle
    expected = oracle.expected(conversation(name))
    prompt = pictures.compose(pair.served, conversation(name))
    assert pictures.whole_ids(prompt, oracle.image_id) == expected.ids
    assert prompt.num_tokens == len(expected.ids)
    images = crops_of(prompt)
    features = torch.zeros(0, 96)
    if expected.pixels is not None:
        crops = torch.cat([cut_crops(image, model.encoder.crop_size) for image in images])
        assert (as_theirs(pair, crops) - expected.pixels).abs().max() < 1e-5
        features = torch.cat(model.encode_images(images))
        assert relative_error(features, oracle.features(expected.inputs)) < TOLERANCE
    hidden = pictures.embedded(model, prompt, features, oracle.image_id)
    runs = [run for image in prompt.images for run in image.spec.runs]
    pieces = segments_of(0, len(hidden), blocks_at(model, runs))
    row = Row()
    states = Driver(model).step([], [(row, hidden[at : at + num], prefix) for at, num, prefix in pieces])
    assert relative_error(model.logits(states), oracle.logits(expected)) < TOLERANCE


def blocks_at(model: PictureModel, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The blocks that attend both ways, among all positions."""
    assert model.card.image is not None
    if model.card.image.attends == "causal":
        return []
    blocks, before = [], 0
    for place, num in runs:
        blocks.append((place + before, place + before + num))
        before += num
    return blocks


def as_theirs(pair: Pair, crops: Tensor) -> Tensor:
    """(C, S, S, 3) uint8 → (C, 3, S, S), normalised."""
    config = pair.model.encoder.config
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return ((crops.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def test_greedy_tokens_in_batches_chunks_and_from_caches(pair: Pair) -> None:
    """All conversations at once, in one step each and in small chunks, then again from the caches."""
    prompts = [pictures.compose(pair.served, conversation(name)) for name in CONVERSATIONS]
    expected = [pair.oracle.greedy(pair.oracle.expected(conversation(name)), NUM) for name in CONVERSATIONS]
    assert len({tuple(tokens) for tokens in expected}) == len(CONVERSATIONS)
    assert min(len(set(tokens)) for tokens in expected) > 5, "the random model repeats itself"
    for mixed_tokens in (1600, 24):
        harness = Harness(pair.model, depth=2, mixed_tokens=mixed_tokens)
        for again in range(2):
            submits = [
                pictures.submit_of(prompt, 10 * again + number, NUM) for number, prompt in enumerate(prompts)
            ]
            streams = harness.answer(submits)
            assert [stream.tokens for stream in streams] == expected
            for stream, prompt in zip(streams, prompts, strict=True):
                assert stream.finish is not None and stream.finish.prompt_tokens == prompt.num_tokens
                whole = prompt.num_tokens - 1
                assert not again or stream.finish.cached_tokens >= whole // 16 * 16 - 16 * bool(prompt.images)
