"""What pages hold: chosen by what the compiled attention reads, and how near narrower ones come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.worker.models.dense_oracle import load, write
from tests.unit.worker.models.paged_driver import Driver, Row, relative_error
from worker.config import ConfigError, WorkerConfig
from worker.models.contract import Model
from worker.native.library import torch_alone
from worker.native.operations import operations
from worker.resolve import choose_kv_dtype

FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kv")
    write(made, "llama", head_dim=32, hidden_size=96)
    return made


def states(model: Model, kept: torch.dtype) -> torch.Tensor:
    with torch.inference_mode():
        driver = Driver(model, num_pages=12, kv_dtype=kept)
        ids = torch.tensor([5, 9, 33, 7, 60, 71, 2])
        row, _ = driver.prefill(model.embed(ids), 0)
        return driver.step([(row, model.embed(ids[:1]))], [(Row(), model.embed(ids), 0)])


@pytest.mark.skipif(operations(torch.device("cpu")) is None, reason="no compiled operations")
def test_auto_takes_the_narrower_pages_that_compiled_attention_reads(folder: Path) -> None:
    model = load(folder)
    assert model.kv_dtype == FLOAT and set(model.kv_dtypes) == {FLOAT, HALF}
    assert 0 < relative_error(states(model, HALF), states(model, FLOAT)) < 0.02
    for settings, kept in (
        ({"dtype": "float32"}, FLOAT),
        ({"kv_dtype": "float32"}, FLOAT),
        ({}, HALF),
        ({"kv_dtype": "float32"}, FLOAT),
        ({"dtype": "float32", "kv_dtype": "bfloat16"}, HALF),
    ):
        choose_kv_dtype(WorkerConfig.model_validate(settings), model)
        assert model.kv_dtype == kept, settings


def test_torch_alone_keeps_what_it_attends_in(folder: Path) -> None:
    with torch_alone():
        model = load(folder)
    assert model.kv_dtypes == (FLOAT,)
    choose_kv_dtype(WorkerConfig(), model)
    assert model.kv_dtype == FLOAT
    with pytest.raises(ConfigError, match=r"kv_dtype is bfloat16.*float32 here.*auto"):
        choose_kv_dtype(WorkerConfig(kv_dtype="bfloat16"), model)
