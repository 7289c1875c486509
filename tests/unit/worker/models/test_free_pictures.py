"""Families whose pictures have any size, beside transformers, on tiny random checkpoints that transformers wrote.

As in `test_pictures`: pixels and ids of the processors, features and logits to 1e-4 in fp32, and greedy tokens through
chunks, batches and both caches.
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
from tests.unit.worker.models.free_oracle import FREE, FreeOracle
from tests.unit.worker.models.paged_driver import Driver, relative_error
from tests.unit.worker.models.picture_oracle import CONVERSATIONS, conversation
from tests.unit.worker.step.test_torch_runner import Harness
from worker.forward import ImageCrops, ImageSheet, PrefillSegment, StepTokens
from worker.models.free_tower import FreeTower
from worker.models.picture_model import PictureModel
from worker.schedule.intake import build_sequence
from worker.schedule.sequence import Sequence

pytestmark = pytest.mark.slow
NUM = 48


@dataclass
class Pair:
    """A model of ours and of theirs."""

    model: PictureModel
    served: AnnouncedModel
    oracle: FreeOracle

    @property
    def tower(self) -> FreeTower:
        assert isinstance(self.model.encoder, FreeTower)
        return self.model.encoder


@pytest.fixture(scope="module", params=FREE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.set_num_threads(1)
    with torch.inference_mode():
        oracle = FREE[request.param](folder)
        model = load(folder)
    assert isinstance(model, PictureModel)
    return Pair(model, pictures.announced(model.card, folder), oracle)


def crops_of(prompt: Prompt) -> list[ImageCrops]:
    """A prompt's pictures as the device has them."""
    found = []
    for image in prompt.images:
        (sheet,), (frame,) = image.spec.sheets, image.frames
        pixels = np.frombuffer(frame, np.uint8).reshape(sheet.height, sheet.width, 3).copy()
        found.append(ImageCrops([ImageSheet(torch.from_numpy(pixels), 1, 1)]))
    return found


def sequence_of(pair: Pair, prompt: Prompt) -> Sequence:
    submit, frames = pictures.submit_of(prompt, 1, 8)
    return build_sequence(b"", submit, frames, pair.model.card, 0.0)


def run(pair: Pair, seq: Sequence, features: Tensor, cuts: list[int]) -> Tensor:
    """(S, V) logits of a prompt in chunks that end at `cuts`, with the features in their places."""
    model, dim = pair.model, 96
    driver = Driver(model)
    ids = torch.tensor(seq.tokens)
    hidden = model.embed(ids.clamp_min(0)).clone()
    hidden[ids < 0] = features[:, :dim]
    taps = torch.zeros(len(ids), features.shape[1] - dim)
    taps[ids < 0] = features[:, dim:]
    states, table = [], torch.arange(1, 500, dtype=torch.int32)
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        index = torch.arange(start, end)
        positions = index
        if seq.rotary is not None:
            positions = torch.from_numpy(seq.rotary[:, start:end].copy()).long()
        tokens = StepTokens(positions, index + 16, None, [PrefillSegment(end - start, start, 0, table)])
        if taps.shape[1]:
            tokens.taps = [(0, taps[start:end])]
        states.append(model.forward(hidden[start:end], tokens, driver.cache))
    return model.logits(torch.cat(states))


@pytest.mark.parametrize("name", CONVERSATIONS)
@torch.inference_mode()
def test_pixels_ids_features_and_logits(pair: Pair, name: str) -> None:
    model, oracle = pair.model, pair.oracle
    expected = oracle.expected(conversation(name))
    prompt = pictures.compose(pair.served, conversation(name))
    assert pictures.whole_ids(prompt, oracle.image_id) == expected.ids
    assert prompt.num_tokens == len(expected.ids)
    images = crops_of(prompt)
    features = torch.zeros(0, 96 * (1 + model.num_taps))
    if expected.pixels is not None:
        ours = torch.cat([pair.tower.pixels(image.sheets[0].pixels) for image in images])
        frames = expected.pixels.unflatten(1, (3, 2, -1)).unbind(2)
        assert all((ours - frame.flatten(1)).abs().max() < 1e-5 for frame in frames)
        features = torch.cat(model.encode_images(images))
        assert relative_error(features, oracle.features(expected.inputs)) < TOLERANCE
    seq = sequence_of(pair, prompt)
    theirs = oracle.logits(expected)
    for cuts in ([], [7, 24, 25]):
        assert relative_error(run(pair, seq, features, cuts), theirs) < TOLERANCE


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
                assert not again or stream.finish.cached_tokens >= whole // 16 * 16 - 16
