"""The context that the settings ask for is known before the weights are read: rotations may depend on it."""

from __future__ import annotations

import json
from pathlib import Path
from queue import SimpleQueue

import pytest

from loadtest.gpu.random_models import _words
from shared.protocol import FromWorker
from tests.unit.worker.models.dense_oracle import write
from tests.unit.worker.models.test_families import LONGROPE
from worker.config import ConfigError, WorkerConfig
from worker.startup import Startup, build_worker


class Nobody:
    """An outbox that no one reads."""

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        """Drop it."""

    def broadcast(self, message: FromWorker) -> None:
        """Drop it."""


def served(folder: Path, context: int) -> int:
    """The context of a worker started on this folder."""
    config = WorkerConfig(
        model=str(folder), device="cpu", dtype="float32", context=context, kv_bytes=8 << 20, threads=1
    )
    worker = build_worker(config, Startup(False), inbox=SimpleQueue(), outbox=Nobody(), epoch=1)
    return worker.ready.model.context_tokens


@pytest.mark.slow
def test_a_longer_context_than_the_usual_takes_the_long_factors(tmp_path: Path) -> None:
    write(tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    (tmp_path / "tokenizer.json").write_text(json.dumps(_words(160)))
    assert served(tmp_path, 0) == 64
    assert served(tmp_path, 200) == 200
    with pytest.raises(ConfigError, match=r"context is 300, and .* has 256 tokens"):
        served(tmp_path, 300)


@pytest.mark.parametrize("setting", ["gpu_without", "gpu_with"])
def test_an_unknown_switch_is_refused_by_name(setting: str) -> None:
    config = WorkerConfig(model="sim", device="sim", **{setting: "histogram, megakernel"})
    with pytest.raises(ConfigError, match=rf"{setting}: megakernel: no such switch; there are .*histogram"):
        build_worker(config, Startup(False), inbox=SimpleQueue(), outbox=Nobody(), epoch=1)
