"""Positions of several axes and features behind several layers, by interpreted kernels: the hidden states of torch's path."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.worker.models.dense_oracle import load
from tests.unit.worker.models.free_oracle import qwen3_vl
from tests.unit.worker.models.paged_driver import Driver, relative_error
from tests.unit.worker.schedule.examples import sequence
from worker.forward import DecodeRows, PrefillSegment, StepTokens, chunk_spans
from worker.schedule.plan import Chunk
from worker.schedule.sequence import Picture, Run
from worker.step.chunk_graphs import ChunkGraphs

NUM = 12


@pytest.mark.slow
def test_kernels_rotate_by_three_axes_and_add_taps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk with a picture, then a decode row behind it, whose position is not its index."""
    monkeypatch.setattr("worker.native.library.load", lambda: None)
    qwen3_vl(tmp_path)
    model = load(tmp_path)
    table = torch.arange(1, 4, dtype=torch.int32)
    hidden, last = torch.randn(NUM, 96), torch.randn(1, 96)
    taps = [(3, torch.randn(6, 2 * 96))]
    positions = torch.randint(0, 40, (3, NUM))

    def states(positions: Tensor) -> Tensor:
        cache = Driver(model).cache
        tokens = StepTokens(positions, torch.arange(16, 16 + NUM), taps=taps)
        tokens.prefills.append(PrefillSegment(NUM, 0, 0, table))
        tokens.spans = torch.tensor(chunk_spans(0, 0, NUM, 0, 0), dtype=torch.int32)
        tokens.tables = table[None]
        chunk = model.forward(hidden.clone(), tokens, cache)
        rows = DecodeRows(1, table[None], torch.tensor([NUM + 1], dtype=torch.int32), NUM + 1)
        row = StepTokens(torch.tensor([7]), torch.tensor([16 + NUM]), rows)
        return torch.cat([chunk, model.forward(last.clone(), row, cache)])

    expected = states(positions)
    assert relative_error(states(torch.arange(NUM).expand(3, -1)), expected) > 0.01, "positions matter"
    model.fuses = True
    assert relative_error(states(positions.int()), expected) < 1e-5


def test_a_chunk_with_taps_runs_eagerly() -> None:
    graphs: Any = ChunkGraphs.__new__(ChunkGraphs)
    graphs.buckets, graphs._model = [], SimpleNamespace(num_taps=2, fuses=True)
    seq = sequence(30)
    seq.pictures = [Picture((Run(10, 5, 0),), [], [], b"")]
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:

        def bucket_of(num: int, _: list[int]) -> int:
            asked.append(num)
            return 0

        patch.setattr("worker.step.chunk_graphs.bucket_of", bucket_of)
        for start, num in ((0, 10), (0, 11), (14, 3), (15, 4)):
            assert graphs.pad(None, [Chunk(seq, start, num, False)]) == 0
    assert asked == [10, 4], "text before and behind the picture may replay a graph"
