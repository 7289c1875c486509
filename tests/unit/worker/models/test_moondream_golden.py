"""Moondream 2's arithmetic against the published reference's own numbers, stage by stage, in fp32 and bf16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shared.protocol import OverlappingTiles
from shared.tiling import canvas_for, choose_tiles
from tests.unit.worker.models.paged_driver import Driver, Row, prepare, relative_error
from worker.forward import ImageCrops
from worker.models.moondream import Moondream
from worker.models.tiling import cut_crops

TOLERANCE = 1e-4
Golden = dict[str, np.ndarray]


def test_tilings(golden_folder: Path) -> None:
    for height, width, tiles_h, tiles_w in json.loads((golden_folder / "tilings.json").read_text()):
        assert choose_tiles(height, width, 266, 112, 12) == (tiles_h, tiles_w), (height, width)
        canvas = canvas_for(height, width, crop_size=378, rule=OverlappingTiles(14, 4, 12))
        assert canvas == (tiles_h, tiles_w, tiles_h * 266 + 112, tiles_w * 266 + 112)


@pytest.mark.parametrize("index", range(4))
def test_crops(index: int, images: list[ImageCrops], golden: Golden) -> None:
    image = images[index]
    assert [image.sheets[1].rows, image.sheets[1].cols] == golden[f"image{index}.tiling"].tolist()
    crops = cut_crops(image, 378, 112)
    means = crops.double().mean(dim=(1, 2))
    assert relative_error(means, golden[f"image{index}.crop_means"]) < 1e-9
    sampled = golden.get(f"image{index}.crops_uint8_sub")
    if sampled is not None:
        assert torch.equal(crops[:, ::7, ::7], torch.from_numpy(sampled))


@pytest.mark.parametrize("index", range(4))
def test_features(index: int, model: Moondream, images: list[ImageCrops], golden: Golden) -> None:
    features = model.vision.features(cut_crops(images[index], 378, 112))
    assert relative_error(features[:, ::9], golden[f"image{index}.features_sub"]) < TOLERANCE


@pytest.mark.parametrize("index", range(4))
def test_embedding(index: int, embeddings: list[Tensor], golden: Golden) -> None:
    assert relative_error(embeddings[index], golden[f"image{index}.embedding"]) < TOLERANCE


def prompt(model: Moondream, embedding: Tensor, tokens: np.ndarray) -> Tensor:
    bos = model.embed(torch.tensor([model.card.bos_id]))
    return torch.cat([bos, embedding, model.embed(torch.from_numpy(tokens))])


def suppress(model: Moondream, logits: Tensor) -> Tensor:
    logits[:, model.card.suppress_ids] = -1e30
    return logits


def test_query_and_greedy_decode_in_one_batch(
    model: Moondream, embeddings: list[Tensor], golden: Golden
) -> None:
    """All four pictures decode as rows of one batch, with padding rows, over shuffled pages."""
    driver = Driver(model)
    rows: list[Row] = []
    firsts = []
    for index in range(4):
        hidden_in = prompt(model, embeddings[index], golden[f"image{index}.query_tokens"])
        row, hidden = driver.prefill(hidden_in, model.prefix_tokens)
        assert relative_error(hidden[-1], golden[f"image{index}.query_hidden"]) < TOLERANCE
        logits = model.logits(hidden[-1:])
        assert relative_error(logits[0], golden[f"image{index}.query_logits"]) < TOLERANCE
        rows.append(row)
        firsts.append(int(logits.argmax()))
    ids = torch.tensor(firsts)
    for position in range(24):
        expected = torch.tensor([int(golden[f"image{index}.greedy_ids"][position]) for index in range(4)])
        assert torch.equal(ids, expected), position
        words = model.embed(ids)
        hidden = driver.step([(row, words[i : i + 1]) for i, row in enumerate(rows)], padding=position % 3)
        logits = suppress(model, model.logits(hidden))
        for index in range(4):
            want = golden[f"image{index}.greedy_logits"][position].astype(np.float64)
            allowed = want > -1e29
            assert relative_error(logits[index][torch.from_numpy(allowed)], want[allowed]) < TOLERANCE
        ids = logits.argmax(-1)


def test_detect_loop(model: Moondream, embeddings: list[Tensor], golden: Golden) -> None:
    """Two objects a picture, forced as the reference was, the four pictures side by side in every step."""
    card, driver = model.card, Driver(model)
    rows, lasts = [], []
    for index in range(4):
        hidden_in = prompt(model, embeddings[index], golden[f"image{index}.detect_tokens"])
        row, hidden = driver.prefill(hidden_in, model.prefix_tokens)
        rows.append(row)
        lasts.append(hidden[-1:])
    hidden = torch.cat(lasts)
    everywhere = torch.ones(4, dtype=torch.bool)

    def check(found: Tensor, name: str, place: tuple[int, ...]) -> None:
        for index in range(4):
            assert relative_error(found[index], golden[f"image{index}.{name}"][place]) < TOLERANCE, name

    def feed(token: int) -> Tensor:
        ids = torch.full((4,), token)
        values = model.decode_values(hidden, ids)
        inputs = model.embed_next(ids, values, everywhere)
        return driver.step([(row, inputs[i : i + 1]) for i, row in enumerate(rows)])

    for number in range(2):
        check(model.logits(hidden), "detect_next", (number,))
        check(model.region.coordinate_logits(hidden), "detect_x", (number,))
        bins = torch.tensor([golden[f"image{index}.detect_bins"][number].tolist() for index in range(4)])
        found = model.decode_values(hidden, torch.full((4,), card.coord_id))
        assert torch.equal(found[:, 0] * 1024, bins[:, 0].float())
        hidden = feed(card.coord_id)
        check(model.region.coordinate_logits(hidden), "detect_y", (number,))
        hidden = feed(card.coord_id)
        check(model.region.size_logits(hidden), "detect_size", (number,))
        sizes = model.decode_values(hidden, torch.full((4,), card.size_id))
        torch.testing.assert_close(sizes, 2 ** (bins[:, 2:].float() / 1023 * 10 - 10))
        hidden = feed(card.size_id)
    check(model.logits(hidden), "detect_next", (2,))


def test_text_only(model: Moondream, golden: Golden) -> None:
    inputs = model.embed(torch.from_numpy(golden["text.tokens"]))
    _, hidden = Driver(model).prefill(inputs, 0)
    assert relative_error(model.logits(hidden[-1:])[0], golden["text.logits"]) < TOLERANCE


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_near(
    kv_dtype: torch.dtype, model_bf16: Moondream, golden: Golden, golden_folder: Path
) -> None:
    model = model_bf16
    image = prepare(model, Image.open(golden_folder / "image2.png").convert("RGB"))
    (embedding,) = model.encode_images([image])
    assert relative_error(embedding.float(), golden["image2.embedding"]) < 3e-2
    driver = Driver(model, kv_dtype=kv_dtype)
    hidden_in = prompt(model, embedding, golden["image2.query_tokens"])
    row, hidden = driver.prefill(hidden_in, model.prefix_tokens)
    assert relative_error(model.logits(hidden[-1:])[0], golden["image2.query_logits"]) < 3e-2
    first = torch.tensor([int(golden["image2.greedy_ids"][0])])
    hidden = driver.step([(row, model.embed(first))])
    want = golden["image2.greedy_logits"][0]
    allowed = want > -1e29
    found = model.logits(hidden)[0][torch.from_numpy(allowed)]
    assert relative_error(found, want[allowed]) < 3e-2
