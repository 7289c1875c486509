"""CONTRIBUTING.md's recipes name files that exist, and its worked examples what stands in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|h|cpp|txt))(?:::\w+)?`", TEXT)))


@pytest.mark.parametrize("name", NAMED)
def test_every_file_named_exists(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize(
    ("file", "quoted"),
    [
        ("worker/models/families/olmo2.py", "NormNames"),
        ("worker/models/families/olmo2.py", "QkNorm.WIDTH"),
        ("tests/unit/worker/kernels/compile_all.py", "compile_for(norm._norm_row, 8, normed, "),
        ("tests/gpu/test_kernels.py", "test_norms_and_activations"),
        ("gateway/app.py", '("/v1/caption", moondream.prepare_caption)'),
        ("worker/schedule/intake.py", '("min_p", s.min_p, 0.0, 1.0)'),
        ("gateway/api/parameters.py", "min_p: Unit | None"),
    ],
)
def test_worked_examples_quote_what_is_there(file: str, quoted: str) -> None:
    assert quoted in (ROOT / file).read_text()
    assert quoted in TEXT
