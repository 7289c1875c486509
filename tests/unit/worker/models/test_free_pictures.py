"""Families whose pictures have any size, beside transformers, on tiny random checkpoints that transformers wrote.

As in `test_pictures`: pixels and ids of the processors, features and logits to 1e-4 in fp32, and greedy tokens through
chunks, batches and both caches.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from gateway.api.prompts import Prompt
from gateway.core.catalog import AnnouncedModel
from tests.unit.worker.models import picture_oracle as pictures
from tests.unit.worker.models.dense_oracle import TOLERANCE, load
from tests.unit.worker.models.free_oracle import FREE, FreeOracle
from tests.unit.worker.models.paged_driver import relative_error
from tests.unit.worker.models.picture_oracle import CONVERSATIONS, conversation
from tests.unit.worker.models.picture_scenes import check_answers, logits_of
from tests.unit.worker.step.graph_device import GraphDevice
from tests.unit.worker.step.test_torch_runner import Harness
from worker.formats.source import CheckpointError
from worker.forward import ImageCrops, ImageSheet
from worker.models.free_tower import FreeTower
from worker.models.picture_model import PictureModel
from worker.models.segment_attention import SegmentAttention
from worker.schedule.intake import build_sequence
from worker.schedule.refusal import Refusal
from worker.schedule.rotary_places import places_of, prompt_places
from worker.schedule.sequence import Picture, Run, Sequence
from worker.step.warm_up import warm_up

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
        assert relative_error(logits_of(model, seq, features, cuts), theirs) < TOLERANCE


def test_greedy_tokens_in_batches_chunks_and_from_caches(pair: Pair) -> None:
    """All conversations at once, in one step each and in small chunks, then again from the caches."""
    prompts = [pictures.compose(pair.served, conversation(name)) for name in CONVERSATIONS]
    expected = [pair.oracle.greedy(pair.oracle.expected(conversation(name)), NUM) for name in CONVERSATIONS]
    assert len({tuple(tokens) for tokens in expected}) == len(CONVERSATIONS)
    assert min(len(set(tokens)) for tokens in expected) > 5, "the random model repeats itself"
    unsure = [16] * len(prompts)
    for mixed_tokens in (1600, 24):
        check_answers(pair.model, prompts, expected, NUM, mixed_tokens, unsure)


def test_pictures_join_running_rows_in_chunks(pair: Pair) -> None:
    """Chunks of pictures share steps with rows that decode behind pictures, and behind none."""
    names = ("small", "text", "two", "one")
    prompts = [pictures.compose(pair.served, conversation(name)) for name in names]
    expected = [pair.oracle.greedy(pair.oracle.expected(conversation(name)), NUM) for name in names]
    harness = Harness(pair.model, depth=2, mixed_tokens=24)
    submits = [pictures.submit_of(prompt, number, NUM) for number, prompt in enumerate(prompts)]
    streams = harness.begin(submits[:2])
    while not all(stream.tokens for stream in streams):
        harness.engine.tick()
    streams += harness.begin(submits[2:])
    while harness.engine.tick():
        pass
    assert len(streams[0].tokens) == NUM and [stream.tokens for stream in streams] == expected


def test_preempted_rows_go_on_at_their_positions(pair: Pair) -> None:
    """So little memory that sequences lose their pages and are prefilled again, generated tokens and all."""
    names = ("two", "one", "turns")
    prompts = [pictures.compose(pair.served, conversation(name)) for name in names]
    expected = [pair.oracle.greedy(pair.oracle.expected(conversation(name)), NUM) for name in names]
    num_pages = 3 + sum(-(-prompt.num_tokens // 16) for prompt in prompts)  # and little for the answers
    harness = Harness(pair.model, depth=2, num_pages=num_pages, cache=False, mixed_tokens=40)
    streams = harness.answer([pictures.submit_of(p, i, NUM) for i, p in enumerate(prompts)])
    assert [stream.tokens for stream in streams] == expected
    assert harness.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_by_torch_alone_and_captured(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled operations, decode rows replayed from recordings that take positions as data."""
    monkeypatch.setattr("worker.native.library.load", lambda: None)
    with torch.inference_mode():
        oracle = FREE[family](tmp_path)
        model = load(tmp_path)
    harness = Harness(model, depth=2, device=GraphDevice(), automata=False)
    assert warm_up(harness.runner) == 0
    served = pictures.announced(model.card, tmp_path)
    names = ("two", "one", "text")
    prompts = [pictures.compose(served, conversation(name)) for name in names]
    streams = harness.answer([pictures.submit_of(p, i, 8) for i, p in enumerate(prompts)])
    expected = [oracle.greedy(oracle.expected(conversation(name)), 8) for name in names]
    assert [stream.tokens for stream in streams] == expected


def test_segments_attend_alike_by_compiled_operations_and_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [12, 4, 12, 1, 30]
    num = sum(lengths)
    rotation = torch.polar(torch.ones(num, 1, 8), torch.rand(num, 1, 8))
    qkv = torch.randn(num, 3 * 2 * 16)
    found = SegmentAttention(lengths, rotation, 2, 16, torch.float32).attend(qkv)
    monkeypatch.setattr("worker.models.segment_attention.operations", lambda device: None)
    by_torch = SegmentAttention(lengths, rotation, 2, 16, torch.float32).attend(qkv)
    assert relative_error(found, by_torch) < 1e-5
    alone = [
        SegmentAttention([length], rotation[at : at + length], 2, 16, torch.float32).attend(
            qkv[at : at + length]
        )
        for at, length in zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True)
    ]
    assert relative_error(by_torch, torch.cat(alone)) < 1e-5


def test_positions_of_pictures_and_what_follows() -> None:
    def picture(at: int, rows: int, cols: int) -> Picture:
        return Picture((Run(at, rows * cols, 0),), [], [], b"", grid=(rows, cols))

    places, shift = prompt_places(16, [picture(2, 2, 3), picture(9, 3, 1)])
    assert places.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 6, 9, 10, 11, 12],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 6, 6, 9, 10, 11, 12],
    ]
    assert shift == -3


def test_generated_tokens_go_on_behind_the_prompt(pair: Pair) -> None:
    seq = sequence_of(pair, pictures.compose(pair.served, conversation("one")))
    end = seq.num_prompt + 2
    tail = places_of(seq, seq.num_prompt - 1, end)
    assert (np.diff(tail, axis=1) == 1).all() and (tail == tail[0]).all()
    assert tail[0, -1] == end - 1 + seq.rotary_shift < end - 1


def test_intake_refuses_what_the_gateway_cannot_have_made(pair: Pair) -> None:
    prompt = pictures.compose(pair.served, conversation("one"))
    submit, frames = pictures.submit_of(prompt, 1, 8)
    (image,) = submit.images
    (sheet,) = image.sheets
    (place, num) = image.runs[0]

    def changed(**values: Any) -> list[Any]:
        return [msgspec.structs.replace(image, **values)]

    def of(height: int, width: int, rows: int = 1) -> list[Any]:
        return [msgspec.structs.replace(sheet, height=height, width=width, rows=rows)]

    cases = [
        (changed(runs=[(place, num - 1), (place, 1)]), "one run here"),
        (changed(runs=[(place, num + 1)]), f"have {num} positions together"),
        (changed(sheets=of(sheet.height + 1, sheet.width)), "whole multiples of 8 pixels"),
        (changed(sheets=of(0, sheet.width)), "whole multiples of 8 pixels"),
        (changed(sheets=of(800, 800)), "positions, not 10000"),
        (changed(sheets=of(sheet.height, sheet.width, 2)), "a picture is one crop here"),
    ]
    for images, words in cases:
        with pytest.raises(Refusal, match=words):
            build_sequence(b"", msgspec.structs.replace(submit, images=images), frames, pair.model.card, 0.0)
    no_sheets = msgspec.structs.replace(submit, images=changed(sheets=[]))
    with pytest.raises(Refusal, match="no sheets"):
        build_sequence(b"", no_sheets, [], pair.model.card, 0.0)


def test_a_picture_that_is_far_too_long_is_refused_by_its_proportions(pair: Pair) -> None:
    with pytest.raises(Exception, match="more than 200 times as long as wide"):
        pictures.compose(pair.served, [("user", [pictures.scene(5, 1100, 1), "?"])])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, to be broken."""
    made = {}
    for name in ("qwen3_vl", "qwen2_5_vl"):
        made[name] = tmp_path_factory.mktemp(name)
        FREE[name](made[name])
    return made


PREPARES = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("family", "file", "changes", "words"),
    [
        ("qwen3_vl", PREPARES, {"patch_size": 8}, "'patch_size' is 8, and the vision tower"),
        ("qwen3_vl", PREPARES, {"merge_size": 4}, "'merge_size' is 4, and the vision tower"),
        ("qwen3_vl", "config.json", {"vision_config.num_heads": 5}, "not a multiple of 4"),
        ("qwen3_vl", "config.json", {"vision_config.hidden_act": "relu"}, "supported is gelu_pytorch_tanh"),
        ("qwen3_vl", "config.json", {"vision_config.out_hidden_size": 64}, "and the decoder is 96 wide"),
        ("qwen3_vl", "config.json", {"vision_config.num_position_embeddings": 37}, "a square is expected"),
        (
            "qwen3_vl",
            "config.json",
            {"vision_config.deepstack_visual_indexes": [1, 5]},
            "layers of the tower",
        ),
        (
            "qwen3_vl",
            "config.json",
            {"text_config.rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 4, 4]}},
            "three numbers are expected, 8 together",
        ),
        ("qwen2_5_vl", "config.json", {"vision_config.window_size": 7}, "'window_size' is below 8 pixels"),
        ("qwen2_5_vl", "config.json", {"vision_config.fullatt_block_indexes": 1}, "layers of the tower"),
        ("qwen2_5_vl", "config.json", {"vision_config.hidden_act": "gelu"}, "supported is silu"),
    ],
    ids=str,
)
def test_what_is_refused_names_the_file_and_the_setting(
    folders: dict[str, Path], family: str, file: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    shutil.copytree(folders[family], tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    change(path, changes)
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)


def change(path: Path, changes: dict[str, Any]) -> None:
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *inner, last = name.split(".")
        (values[inner[0]] if inner else values)[last] = value
    path.write_text(json.dumps(values))


def test_the_largest_picture_is_the_folders_ours_or_the_one_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def most() -> tuple[int, int]:
        image = load(tmp_path).card.image
        assert image is not None
        return image.rule.min_pixels, image.rule.max_pixels  # type: ignore[union-attr]

    shutil.copytree(folders["qwen3_vl"], tmp_path, dirs_exist_ok=True)
    assert most() == (256, 4096)
    change(tmp_path / PREPARES, {"size": {"shortest_edge": 256, "longest_edge": 1 << 24}})
    assert most() == (256, 1024 * 8 * 8), "half of the context of 2048"
    change(tmp_path / "config.json", {"degas": {"max_pixels": 1 << 20}})
    assert most() == (256, 1 << 20)
