"""Owns what the model tests share: the golden numbers and the model loaded from the golden checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.worker.models.paged_driver import GOLDEN, prepare, quiet
from worker.formats.folder import Folder
from worker.forward import ImageCrops
from worker.models.moondream import Moondream
from worker.models.moondream_load import load


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def model() -> Moondream:
    return load(Folder(GOLDEN), torch.device("cpu"), torch.float32, quiet)


@pytest.fixture(scope="session")
def model_bf16() -> Moondream:
    return load(Folder(GOLDEN), torch.device("cpu"), torch.bfloat16, quiet)


@pytest.fixture(scope="session")
def images(model: Moondream) -> list[ImageCrops]:
    return [prepare(model, Image.open(GOLDEN / f"image{index}.png").convert("RGB")) for index in range(4)]


@pytest.fixture(scope="session")
def embeddings(model: Moondream, images: list[ImageCrops]) -> list[torch.Tensor]:
    """The pictures' input embeddings, computed in one batch."""
    with torch.inference_mode():
        return model.encode_images(images)
