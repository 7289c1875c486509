"""`degas bench pictures` beside another's processor: a stand-in that answers as the real one does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loadtest.bench import picture_peer
from loadtest.bench.picture_peer import Processor
from loadtest.bench.pictures import SPECS, measure, pictures_table
from loadtest.gateway.environment import ReferenceError

STAND_IN = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    assert open(asked["path"], "rb").read(2) == bytes((0xFF, 0xD8))
    print(json.dumps({"seconds": 1000.0, "shape": [1]}), flush=True)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "stand_in.py"
    monkeypatch.setattr(picture_peer, "_SCRIPT", path)
    return path


def test_a_model_with_a_processor_is_put_beside_it(script: Path) -> None:
    script.write_text(STAND_IN)
    with Processor(sys.executable) as processor:
        pocket, smolvlm = measure([0.5], ["pocket", "smolvlm"], 1, processor)
    assert (pocket.transformers_per_s, pocket.transformers_ratio) == (None, None)
    assert smolvlm.transformers_per_s == pytest.approx(0.001)
    assert smolvlm.transformers_ratio is not None and smolvlm.transformers_ratio > 1000
    assert smolvlm.mean_difference == 0, "below a megapixel every pixel is the whole picture's"
    pictures_table([pocket, smolvlm])
    assert set(picture_peer.PEERS) <= set(SPECS)


@pytest.mark.parametrize("body", ["raise ImportError('no torchvision')", STAND_IN.replace("1000.0", "1/0")])
def test_a_processor_that_fails_says_why_in_one_line(script: Path, body: str) -> None:
    script.write_text(body)
    with (
        pytest.raises(ReferenceError, match=r"no torchvision|division by zero"),
        Processor(sys.executable) as one,
    ):
        measure([0.5], ["smolvlm"], 1, one)
