"""`dtype auto`: what this processor multiplies quickly, for prompts and rows both; never emulated bf16 by default."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worker import resolve
from worker.config import WorkerConfig

CPU: Any = SimpleNamespace(torch_device=torch.device("cpu"))
GB = 1 << 30


@pytest.mark.parametrize(
    ("has_bf16", "compiled", "num_bytes", "dtype"),
    [
        (True, [torch.bfloat16, torch.float32], 1 << 20, torch.bfloat16),
        (True, [], GB, torch.bfloat16),
        (True, [], 1 << 20, torch.float32),  # small, by torch's operations
        (False, [torch.float32], 100 * GB, torch.float32),  # whatever was saved in bf16 is kept so
        (False, [torch.bfloat16, torch.float32], GB, torch.float32),
        (False, [], GB, torch.float32),
        (False, [], 100 * GB, torch.bfloat16),  # or it would not fit
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch,
    has_bf16: bool,
    compiled: list[torch.dtype],
    num_bytes: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(resolve, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr(resolve, "available_bytes", lambda: 16 * GB)
    monkeypatch.setattr(resolve, "products", lambda device: SimpleNamespace(multiplies=compiled.__contains__))
    source: Any = SimpleNamespace(num_bytes=num_bytes)
    assert resolve.choose_dtype(WorkerConfig(), CPU, source) is dtype


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "has_bf16", lambda: False)
    source: Any = SimpleNamespace(num_bytes=GB)
    assert resolve.choose_dtype(WorkerConfig(dtype="bfloat16"), CPU, source) is torch.bfloat16
