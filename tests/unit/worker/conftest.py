"""Fixtures of the worker's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def exact_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with blocks take activations as they are: what is compared with a reference's numbers, not with its meaning."""
    monkeypatch.setattr("worker.native.products._activations", "exact")
