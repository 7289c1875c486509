"""Families that read pictures beside transformers, on tiny random checkpoints that transformers wrote.

From the file and the conversation to the last token: pixels and ids of the processors, features and logits to 1e-4 in
fp32, and greedy tokens through chunks, batches and both caches.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gateway.core.catalog import AnnouncedModel
from shared.pictures import num_tokens
from tests.unit.worker.models import picture_oracle as pictures
from tests.unit.worker.models.dense_oracle import TOLERANCE, load
from tests.unit.worker.models.paged_driver import Driver, Row, relative_error
from tests.unit.worker.models.picture_oracle import CONVERSATIONS, FAMILIES, Oracle, conversation
from tests.unit.worker.models.picture_scenes import check_answers, images_of
from tests.unit.worker.step.graph_device import GraphDevice
from tests.unit.worker.step.test_torch_runner import Harness
from worker.formats.source import CheckpointError
from worker.forward import ImageCrops, segments_of
from worker.models.picture_model import PictureModel
from worker.models.tiling import cut_crops
from worker.models.vision_tower import Tower
from worker.native.operations import operations
from worker.step.warm_up import warm_up

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


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_pixels_ids_features_and_logits(pair: Pair, name: str) -> None:
    model, oracle = pair.model, pair.oracle
    expected = oracle.expected(conversation(name))
    prompt = pictures.compose(pair.served, conversation(name))
    assert pictures.whole_ids(prompt, oracle.image_id) == expected.ids
    assert prompt.num_tokens == len(expected.ids)
    images = images_of(prompt)
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
    unsure = [16 * bool(prompt.images) for prompt in prompts]
    for mixed_tokens in (1600, 24):
        check_answers(pair.model, prompts, expected, NUM, mixed_tokens, unsure)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, to be broken."""
    made = {}
    for name in ("smolvlm", "gemma3", "internvl"):
        made[name] = tmp_path_factory.mktemp(name)
        FAMILIES[name](made[name])
    return made


PREPARES = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("family", "file", "changes", "words"),
    [
        ("smolvlm", PREPARES, None, "nothing says how pictures are prepared"),
        ("smolvlm", PREPARES, {"max_image_size": {"longest_edge": 64}}, "is 64 pixels, and the vision tower"),
        ("smolvlm", PREPARES, {"do_normalize": False}, "'do_normalize' is false"),
        ("smolvlm", PREPARES, {"rescale_factor": 0.5}, "supported is 1/255"),
        ("smolvlm", PREPARES, {"resample": 5}, "'resample' is 5; supported are 0, 1, 2, 3"),
        ("smolvlm", PREPARES, {"image_std": [0.5, 0, 0.5]}, "not above 0"),
        ("smolvlm", PREPARES, {"image_mean": "0.5"}, "'image_mean' is not a list of three numbers"),
        ("smolvlm", "config.json", {"scale_factor": 3}, "4 patches a side do not divide by 3"),
        ("smolvlm", "config.json", {"text_config.model_type": "mamba"}, "'mamba'; supported is llama"),
        ("smolvlm", "config.json", {"vision_config.hidden_act": "relu"}, "supported are gelu and"),
        ("smolvlm", "config.json", {"vision_config.patch_size": 7}, "not whole patches"),
        ("gemma3", "config.json", {"mm_tokens_per_image": 9}, "does not divide 4 × 4 patches"),
        ("gemma3", "config.json", {"vision_config.vision_use_head": True}, "'vision_use_head'"),
        ("gemma3", PREPARES, {"do_pan_and_scan": True}, "'pan_and_scan_min_crop_size' is missing"),
        ("internvl", "config.json", {"vision_config.use_qk_norm": True}, "'use_qk_norm' is True"),
        (
            "internvl",
            "config.json",
            {"text_config.model_type": "internlm2"},
            "supported are qwen2, qwen3, llama",
        ),
        ("internvl", PREPARES, {"min_patches": 7}, "'min_patches' is above 'max_patches'"),
    ],
    ids=str,
)
def test_what_is_refused_names_the_file_and_the_setting(
    folders: dict[str, Path],
    family: str,
    file: str,
    changes: dict[str, Any] | None,
    words: str,
    tmp_path: Path,
) -> None:
    shutil.copytree(folders[family], tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    if changes is None:
        path.unlink()
    else:
        values = json.loads(path.read_text())
        for name, value in changes.items():
            *inner, last = name.split(".")
            (values[inner[0]] if inner else values)[last] = value
        path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        load(tmp_path)
    assert str(tmp_path if changes is None else path) in str(caught.value)


def test_released_folders_spellings_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """The processor's part of processor_config.json, and a decoder whose settings are mostly its class's defaults."""
    shutil.copytree(folders["gemma3"], tmp_path, dirs_exist_ok=True)
    prepares = tmp_path / PREPARES
    inner = {"image_processor": json.loads(prepares.read_text())}
    (tmp_path / "processor_config.json").write_text(json.dumps(inner))
    prepares.unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("hidden_activation", "rms_norm_eps", "use_bidirectional_attention", "bos_token_id"):
        del config["text_config"][name]
    config["vision_config"].pop("hidden_act")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for folder in (folders["gemma3"], tmp_path):
        assert load(folder).card.image == load(folders["gemma3"]).card.image
    ids = torch.arange(4, 40)
    found = [
        model.logits(Driver(model).prefill(model.embed(ids), 0)[1])
        for model in (load(folders["gemma3"]), load(tmp_path))
    ]
    assert torch.equal(*found)


def test_users_words_are_never_placeholders(pair: Pair) -> None:
    """A placeholder that a user types is text, and pictures stay where they were put."""
    layout = pair.served.card.image
    assert layout is not None
    mark = layout.layout.placeholder
    turns: list[pictures.Turn] = [
        ("user", [f"{mark} is", pictures.scene(20, 20, 1), f"no {mark}{layout.layout.run}"])
    ]
    prompt = pictures.compose(pair.served, turns)
    (image,) = prompt.images
    assert image.num_tokens == num_tokens(layout, image.spec.sheets)
    text = pair.served.decode(prompt.ids, keep_special=True)
    assert f"{mark} is" in text and f"no {mark}{layout.layout.run}" in text


def test_which_towers_attend_by_compiled_operations(pair: Pair, request: pytest.FixtureRequest) -> None:
    if operations(torch.device("cpu")) is None:
        pytest.skip("no compiled operations on this machine")
    tower = pair.model.encoder
    assert isinstance(tower, Tower)
    is_compiled = tower.config.dim // tower.config.num_heads in (16, 72)
    assert is_compiled == ("idefics3" not in request.node.name)
    assert all((block.attention is not None) == is_compiled for block in tower._blocks)


@pytest.mark.parametrize("family", ["gemma3", "internvl"])
def test_warm_up_encodes_a_picture_and_captured_towers_give_the_same_tokens(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "worker.native.library.load", lambda: None
    )  # a recording shows torch's operations only
    with torch.inference_mode():
        oracle = FAMILIES[family](tmp_path)
        model = load(tmp_path)
    assert isinstance(model, PictureModel)
    encoded: list[int] = []
    encode = model.encode_images

    def watched(images: list[ImageCrops], *given: Any) -> list[Tensor]:
        encoded.append(len(images))
        return encode(images, *given)

    monkeypatch.setattr(model, "encode_images", watched)
    harness = Harness(model, depth=2, device=GraphDevice(), automata=False)
    assert warm_up(harness.runner) == 0 and encoded == [1]
    served = pictures.announced(model.card, tmp_path)
    names = ("two", "one", "text")
    prompts = [pictures.compose(served, conversation(name)) for name in names]
    streams = harness.answer([pictures.submit_of(p, i, 8) for i, p in enumerate(prompts)])
    expected = [oracle.greedy(oracle.expected(conversation(name)), 8) for name in names]
    assert [stream.tokens for stream in streams] == expected
    assert "vision" not in harness.runner.graph_counts.eager_steps_total and len(encoded) > 1
