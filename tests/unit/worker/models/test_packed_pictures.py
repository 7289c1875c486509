"""Pictures of several requests, of any sizes, encoded as one run of tokens: each as it is alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.worker.models.dense_oracle import load
from tests.unit.worker.models.free_oracle import FREE
from tests.unit.worker.models.paged_driver import relative_error
from worker.forward import ImageCrops, ImageSheet
from worker.models import picture_model
from worker.models.free_tower import FreeTower
from worker.models.picture_model import PictureModel, packs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_each_is_as_it_is_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        FREE[family](tmp_path)
        model = load(tmp_path)
        assert isinstance(model, PictureModel) and isinstance(model.encoder, FreeTower)
        unit = model.encoder.config.unit
        generator = torch.Generator().manual_seed(4)
        images = [
            ImageCrops(
                [
                    ImageSheet(
                        torch.randint(
                            256, (high * unit, wide * unit, 3), generator=generator, dtype=torch.uint8
                        ),
                        1,
                        1,
                    )
                ]
            )
            for high, wide in ((2, 3), (5, 2), (1, 1), (4, 4))
        ]
        calls: list[int] = []
        whole = FreeTower.features_of

        def counted(self: FreeTower, crops: list[torch.Tensor]) -> list[torch.Tensor]:
            calls.append(len(crops))
            return whole(self, crops)

        monkeypatch.setattr(FreeTower, "features_of", counted)
        alone = [model.encode_images([image])[0] for image in images]
        together = model.encode_images(images)
        assert calls == [1, 1, 1, 1, 4]
        monkeypatch.setitem(picture_model.PACKED_PATCHES, "cpu", 1)
        model.encode_images(images)
        assert calls[5:] == [1, 1, 1, 1]
    for one, other in zip(alone, together, strict=True):
        assert one.shape == other.shape and relative_error(other, one) < 1e-5


def test_neighbours_go_together_as_long_as_they_fit() -> None:
    assert list(packs([], 8)) == []
    assert list(packs([9], 8)) == [(0, 1)]
    assert list(packs([3, 5, 1, 9, 2, 2], 8)) == [(0, 2), (2, 3), (3, 4), (4, 6)]
