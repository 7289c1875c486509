"""Whole small models through the fused kernels against the same models through plain torch, token by token."""

from __future__ import annotations

import pytest
import torch

from loadtest.random_models import random_model
from tests.unit.models.paged_driver import Driver, Row
from worker.models.dense import Dense
from worker.models.moondream import Moondream


def run(model: Moondream | Dense, prefix: int) -> list[torch.Tensor]:
    """Prefills in one piece and in chunks, mixed with decode rows and padding: hidden states of each step."""
    driver = Driver(model, num_pages=60, kv_dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    width = model.embed(torch.tensor([0])).shape[1]

    def draw(num: int) -> torch.Tensor:
        return torch.randn(num, width, generator=generator)

    first, second, third = Row(), Row(), Row()
    out = [driver.step([], [(first, draw(40), prefix), (second, draw(7), 0)])]
    out.append(driver.step([(first, draw(1)), (second, draw(1))], [(third, draw(17), 0)]))
    out.append(driver.step([(first, draw(1))], [(third, draw(9), 0)]))
    rows = (first, second, third)
    out += [driver.step([(row, draw(1)) for row in rows], padding=1) for _ in range(3)]
    return out


@pytest.mark.parametrize(("shape", "prefix"), [("tiny-moondream", 30), ("tiny-qwen3", 0), ("tiny-llama", 0)])
def test_fused_equals_plain(shape: str, prefix: int) -> None:
    model = random_model(shape, torch.device("cpu"), torch.float32).model
    assert not model.fuses
    plain = run(model, prefix)
    model.fuses = True
    for found, expected in zip(run(model, prefix), plain, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_a_cut_prefix_is_refused() -> None:
    model = random_model("tiny-moondream", torch.device("cpu"), torch.float32).model
    model.fuses = True
    with pytest.raises(ValueError, match="cuts a prefix"):
        Driver(model).step([], [(Row(), torch.randn(5, 64), 30)])
