"""Owns the switch to Triton's interpreter, set before any kernel is imported: these tests need no GPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="kernel tests need Triton (its interpreter): pip install triton")

import torch


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
