"""LFM2-VL beside transformers, on tiny random checkpoints that transformers wrote.

As in `test_pictures`: pixels and ids of the processor, features and logits to 1e-4 in fp32, and greedy tokens through
chunks, batches and both caches; the states of the decoder's convolutions lie in the same pages.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gateway.core.catalog import AnnouncedModel
from shared.pictures import drawings, fault_of, max_tokens, unit_tokens
from shared.protocol import FreeTiles, ImageSpec, Sheet
from shared.tiling import MOST_RATIO
from tests.unit.worker.models import picture_oracle as pictures
from tests.unit.worker.models.dense_oracle import TOLERANCE, load
from tests.unit.worker.models.flex_oracle import (
    FLEX,
    PROCESSOR,
    FlexOracle,
    batch_of,
    crops_of,
    free_size,
    grid_of,
)
from tests.unit.worker.models.paged_driver import Driver, Row, relative_error
from tests.unit.worker.models.picture_oracle import CONVERSATIONS, conversation, scene
from tests.unit.worker.models.picture_scenes import check_answers, images_of
from tests.unit.worker.step.graph_device import GraphDevice
from tests.unit.worker.step.test_torch_runner import Harness
from worker.formats.source import CheckpointError
from worker.forward import ImageCrops
from worker.models.flex_tower import FlexTower, resampling
from worker.models.picture_model import PictureModel
from worker.models.tiling import cut_crops
from worker.step.warm_up import warm_up

pytestmark = pytest.mark.slow
NUM = 48


@dataclass
class Pair:
    """A model of ours and of theirs."""

    model: PictureModel
    served: AnnouncedModel
    oracle: FlexOracle


@pytest.fixture(scope="module", params=FLEX)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp("flex"))


def make_pair(name: str, folder: Path) -> Pair:
    torch.set_num_threads(1)
    with torch.inference_mode():
        oracle = FLEX[name](folder)
        model = load(folder)
    assert isinstance(model, PictureModel)
    return Pair(model, pictures.announced(model.card, folder), oracle)


def patches_of(pair: Pair, image: ImageCrops) -> list[Tensor]:
    """(patches, P·P·3) of each crop, normalised by the tower."""
    tower, spec = pair.model.encoder, pair.model.card.image
    assert isinstance(tower, FlexTower) and spec is not None
    found: list[Tensor] = []
    for sheet in image.sheets:
        is_one = sheet.rows == sheet.cols == 1
        crops = sheet.pixels.unsqueeze(0) if is_one else cut_crops(ImageCrops([sheet]), spec.crop_size)
        found += tower.pixels(crops)
    return found


@pytest.mark.parametrize("name", CONVERSATIONS)
@torch.inference_mode()
def test_pixels_ids_features_and_logits(pair: Pair, name: str) -> None:
    model, oracle = pair.model, pair.oracle
    expected = oracle.expected(conversation(name))
    prompt = pictures.compose(pair.served, conversation(name))
    assert pictures.whole_ids(prompt, oracle.image_id) == expected.ids
    assert prompt.num_tokens == len(expected.ids)
    images = images_of(prompt)
    features = torch.zeros(0, 96)
    if expected.pixels is not None:
        ours = [own for image in images for own in patches_of(pair, image)]
        shapes = expected.inputs["spatial_shapes"].prod(1).tolist()
        assert [len(own) for own in ours] == shapes
        for own, theirs, num in zip(ours, expected.pixels, shapes, strict=True):
            assert (own - theirs[:num]).abs().max() < 1e-5
        features = torch.cat(model.encode_images(images))
        assert relative_error(features, oracle.features(expected.inputs)) < TOLERANCE
    hidden = pictures.embedded(model, prompt, features, oracle.image_id)
    theirs = oracle.logits(expected)
    for cuts in ([], [7, 24, 25]):
        driver, row, ends = Driver(model), Row(), [*cuts, len(hidden)]
        states = [
            driver.step([], [(row, hidden[start:end], 0)])
            for start, end in zip([0, *cuts], ends, strict=True)
        ]
        assert relative_error(model.logits(torch.cat(states)), theirs) < TOLERANCE


def test_greedy_tokens_in_batches_chunks_and_from_caches(pair: Pair, request: pytest.FixtureRequest) -> None:
    """All conversations at once, in one step each and in small chunks, then again from the caches."""
    prompts = [pictures.compose(pair.served, conversation(name)) for name in CONVERSATIONS]
    is_usual = request.node.callspec.params["pair"] == "lfm2_vl"
    num = NUM if is_usual else 16
    expected = [pair.oracle.greedy(pair.oracle.expected(conversation(name)), num) for name in CONVERSATIONS]
    assert len({tuple(tokens) for tokens in expected}) == len(CONVERSATIONS)
    assert min(len(set(tokens)) for tokens in expected) > 5, "the random model repeats itself"
    unsure = [0] * len(prompts)
    for mixed_tokens in (1600, 24) if is_usual else (40,):
        check_answers(pair.model, prompts, expected, num, mixed_tokens, unsure)


def test_rows_that_lose_their_pages_go_on(tmp_path: Path) -> None:
    pair = make_pair("lfm2_vl", tmp_path)
    names = ("two", "one", "turns")
    prompts = [pictures.compose(pair.served, conversation(name)) for name in names]
    expected = [pair.oracle.greedy(pair.oracle.expected(conversation(name)), NUM) for name in names]
    num_pages = 3 + sum(-(-prompt.num_tokens // 16) for prompt in prompts)  # and little for the answers
    harness = Harness(pair.model, depth=2, num_pages=num_pages, cache=False, mixed_tokens=40)
    streams = harness.answer([pictures.submit_of(p, i, NUM) for i, p in enumerate(prompts)])
    assert [stream.tokens for stream in streams] == expected
    assert harness.engine.scheduler.num_preemptions > 0


def test_by_torch_alone_and_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.native.library.load", lambda: None)
    pair = make_pair("lfm2_vl", tmp_path)
    harness = Harness(pair.model, depth=2, device=GraphDevice(), automata=False)
    assert warm_up(harness.runner) == 0
    names = ("two", "one", "text")
    prompts = [pictures.compose(pair.served, conversation(name)) for name in names]
    streams = harness.answer([pictures.submit_of(p, i, 8) for i, p in enumerate(prompts)])
    expected = [pair.oracle.greedy(pair.oracle.expected(conversation(name)), 8) for name in names]
    assert [stream.tokens for stream in streams] == expected


def test_what_is_encoded_by_itself(pair: Pair, request: pytest.FixtureRequest) -> None:
    """A tile, or the crop of the whole where that has no more positions than a tile; else the picture."""
    assert pair.model.card.image is not None
    assert unit_tokens(pair.model.card.image) == (0 if "beyond" in request.node.name else 64)


@pytest.mark.parametrize(("source", "target"), [(6, 6), (6, 8), (6, 3), (6, 4), (16, 5), (5, 16), (16, 1)])
def test_positions_are_resampled_as_torch_does(source: int, target: int) -> None:
    table = torch.randn(1, 3, source, source)
    expected = F.interpolate(table, (target, source), mode="bilinear", antialias=True, align_corners=False)
    found = torch.tensordot(resampling(source, target, torch.device("cpu")), table[0], ([1], [1]))
    assert (found.transpose(0, 1) - expected[0]).abs().max() < 1e-5


def test_sizes_of_all_proportions() -> None:
    """As released folders prepare pictures, beside the second implementation; five to four is as near to 1:2 as to 2:1."""
    rule = FreeTiles(32, 64 * 1024, 256 * 1024, 512 * 1024, 16, 2, 10)
    spec = ImageSpec(512, 256, rule, "bilinear")
    said = {**PROCESSOR, "encoder_patch_size": 16, "tile_size": 512, "max_tiles": 10}
    said |= {"min_image_tokens": 64, "max_image_tokens": 256}
    rng = np.random.default_rng(5)
    sizes = [(int(10 ** rng.uniform(0.7, 3.9)), int(10 ** rng.uniform(0.7, 3.9))) for _ in range(300)]
    for width, height in [*sizes, (1250, 1000), (1000, 1250), (5000, 4000), (7, 1400), (1399, 7)]:
        if max(width, height) > MOST_RATIO * min(width, height):
            continue
        sheets = [drawing.sheet for drawing in drawings(spec, width, height)]
        (cols, rows), (wide, high) = grid_of(width, height, said), free_size(width, height, said)
        tiles = [] if (cols, rows) == (1, 1) else [Sheet(rows, cols, 512 * rows, 512 * cols)]
        assert sheets == [*tiles, Sheet(1, 1, high, wide)], (width, height)
        assert fault_of(spec, sheets) == ""
    assert (unit_tokens(spec), max_tokens(spec)) == (256, 2816)


def test_sheets_that_a_gateway_cannot_have_made() -> None:
    spec = ImageSpec(64, 64, FreeTiles(8, 256, 1024, 2048, 4, 2, 6))
    tiles, whole = Sheet(1, 2, 64, 128), Sheet(1, 1, 32, 32)
    assert fault_of(spec, [tiles, whole]) == fault_of(spec, [whole]) == ""
    for sheets, words in (
        ([tiles], "has a sheet of the whole"),
        ([tiles, tiles, whole], "a sheet of tiles and one that shows the whole"),
        ([whole, whole], "a sheet of tiles and one that shows the whole"),
        ([Sheet(1, 7, 64, 448), whole], "has 2 to 6 tiles"),
        ([Sheet(1, 2, 64, 129), whole], "has 64×128 pixels"),
        ([Sheet(0, 2, 0, 128), whole], "has 0×128 pixels"),
        ([Sheet(1, 1, 30, 32)], "whole multiples of 8 pixels"),
        ([Sheet(1, 1, 800, 800)], "a crop has at most"),
        ([], "no sheets"),
    ):
        assert words in fault_of(spec, sheets), sheets


def test_sizes_and_pixels_are_the_processors() -> None:
    """The second implementation beside transformers' processor, which wants torchvision: its filter rounds otherwise."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor

    rng = np.random.default_rng(3)
    for changes in ({}, {"use_thumbnail": False}, {"do_image_splitting": False}, {"max_image_tokens": 60}):
        said = {**PROCESSOR, **changes}
        processor = Lfm2VlImageProcessor(**{k: v for k, v in said.items() if k != "image_processor_type"})
        for _ in range(60):
            width, height = (int(10 ** rng.uniform(0.8, 2.6)) for _ in range(2))
            image = scene(width, height, int(rng.integers(1000)))
            theirs = processor([[image]], return_tensors="pt", return_row_col_info=True)
            grid, whole, _ = crops_of(image, said)
            assert [theirs["image_cols"][0], theirs["image_rows"][0]] == [int(one) for one in grid], (
                width,
                height,
            )
            assert [int(one) for one in np.ravel(theirs["image_sizes"])] == [whole[1], whole[0]]
            ours = batch_of([image], said)
            assert torch.equal(ours["spatial_shapes"], theirs["spatial_shapes"])
            if int(ours["spatial_shapes"].prod(1).max()) > theirs["pixel_attention_mask"].shape[1]:
                continue  # so long and thin that its own padding does not hold it
            assert torch.equal(ours["pixel_attention_mask"], theirs["pixel_attention_mask"])
            levels = (ours["pixel_values"] - theirs["pixel_values"]).abs() * 255 * max(said["image_std"])
            assert levels.max() < 2.6 and levels.mean() < 0.5, (width, height)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be broken."""
    made: Path = tmp_path_factory.mktemp("broken")
    FLEX["lfm2_vl"](made)
    return made


PREPARES = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (PREPARES, {"encoder_patch_size": 8}, "'encoder_patch_size' is 8, and config.json's model has 4"),
        (PREPARES, {"downsample_factor": 4}, "'downsample_factor' is 4, and config.json's model has 2"),
        (PREPARES, {"tile_size": 60}, "'tile_size' is 60; whole squares of 8 pixels"),
        (PREPARES, {"min_image_tokens": 17}, "'min_image_tokens' is above 'max_image_tokens'"),
        (PREPARES, {"min_tiles": 7}, "'min_tiles' is above 'max_tiles'"),
        (PREPARES, {"min_tiles": 1}, "'min_tiles' is 1; a picture that is cut has at least 2 tiles"),
        ("config.json", {"vision_config.num_patches": 37}, "'num_patches' is 37; a square is expected"),
        ("config.json", {"vision_feature_layer": -2}, "'vision_feature_layer' is -2; supported is -1"),
        ("config.json", {"projector_hidden_act": "relu"}, "supported are gelu and gelu_pytorch_tanh"),
        ("config.json", {"text_config.model_type": "llama"}, "'llama'; supported is lfm2"),
        ("config.json", {"text_config.layer_types": ["conv"] * 4}, "no layer attends"),
    ],
    ids=str,
)
def test_what_is_refused_names_the_file_and_the_setting(
    folder: Path, file: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *inner, last = name.split(".")
        (values[inner[0]] if inner else values)[last] = value
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)
