"""`degas bench first-picture` on a tiny random model: both sides choose alike, and the second question is spared the picture."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loadtest.bench.cli import app

pytest.importorskip("transformers")


@pytest.mark.slow
def test_a_tiny_model_beside_transformers() -> None:
    asked = ["first-picture", "--shape", "tiny", "--dtype", "float32", "--threads", "1", "--rounds", "2"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(
        done.stdout[done.stdout.index("[\n") if "[\n" in done.stdout else done.stdout.index("[{") :]
    )
    assert found["crops"] == 5 and found["tokens"] == 9 + 5 * 4
    assert found["same_token"] == 1.0 and found["again_ms"] > 0 and found["ratio"] > 0


def test_a_shape_that_nobody_knows() -> None:
    done = CliRunner().invoke(app, ["first-picture", "--shape", "other"])
    assert done.exit_code == 2 and "tiny" in done.output
