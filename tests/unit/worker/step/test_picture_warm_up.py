"""What a CPU worker encodes before it is ready: a picture of one crop always, more while there is time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from shared.image_spec import EdgeTiles, FreeSize, ImageSpec, OneCrop
from worker.device.cpu import CpuDevice
from worker.formats.locate import locate
from worker.formats.open_source import open_source
from worker.models.contract import Model
from worker.models.registry import load_model
from worker.step.staging import StepShape
from worker.step.torch_runner import TorchRunner
from worker.step.warm_up import PICTURES_S, _picture_sizes, warm_up


@pytest.fixture(scope="module")
def pocket() -> Model:
    with torch.inference_mode():
        return load_model(open_source(locate("pocket")), torch.device("cpu"), torch.float32, lambda *_: None)


def runner_of(model: Model) -> TorchRunner:
    shape = StepShape(
        max_rows=2,
        max_sequence_tokens=256,
        step_tokens=64,
        page_tokens=16,
        num_pages=40,
        vocab_size=model.card.vocab_size,
    )
    return TorchRunner(model, CpuDevice(), shape)


def warmed(
    model: Model, monkeypatch: pytest.MonkeyPatch, crop_s: float, budget_s: float
) -> tuple[list[int], Any]:
    """Crops of each picture that was encoded where a crop takes so long, and what was logged."""
    now, crops = [0.0], []
    encode: Callable[..., list[Tensor]] = type(model).encode_images

    def counted(self: Model, images: Any, features: Any = None) -> list[Tensor]:
        crops.append(sum(sheet.rows * sheet.cols for image in images for sheet in image.sheets))
        now[0] += crops[-1] * crop_s
        return encode(self, images, features)

    monkeypatch.setattr(type(model), "encode_images", counted)
    with capture_logs() as told:
        assert warm_up(runner_of(model), budget_s=budget_s, clock=lambda: now[0]) == 0
    return crops, told


def test_a_slow_tower_encodes_one_picture(pocket: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    crops, told = warmed(pocket, monkeypatch, crop_s=PICTURES_S, budget_s=120.0)
    assert len(crops) == 1
    (line,) = [one for one in told if one["event"] == "warmed_up"]
    assert line["pictures"] == 1 and line["seconds"] == pytest.approx(crops[0] * PICTURES_S)


def test_a_quick_one_encodes_each_number_of_crops(pocket: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    crops, _ = warmed(pocket, monkeypatch, crop_s=1e-6, budget_s=120.0)
    assert len(crops) > 2 and crops == sorted(set(crops))


def test_no_time_no_picture(pocket: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert warmed(pocket, monkeypatch, crop_s=0.0, budget_s=0.0) == ([], [])


def test_pictures_for_each_way_of_cutting() -> None:
    assert len(_picture_sizes(ImageSpec(64, 4, OneCrop()))) == 1
    assert _picture_sizes(ImageSpec(28, 1, FreeSize(28 * 28, 1 << 20))) == [(448, 448)]
    sizes = _picture_sizes(ImageSpec(512, 64, EdgeTiles(2048)))
    assert sizes and len(sizes) == len(set(sizes))
