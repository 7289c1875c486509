"""`degas bench quality` on a tiny random model: what rounding costs, and that nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from loadtest.bench.cli import app
from loadtest.bench.quality import PASSAGE, measure_text, pocket_table, text_table
from loadtest.peers.checkpoint import write_checkpoint
from tests.unit.worker.formats.tiny_gguf import make_oracle, write_gguf
from worker.formats.locate import locate
from worker.formats.open_source import open_source
from worker.models.held import held_bytes
from worker.models.linear import PackedLinear
from worker.models.registry import load_model
from worker.native.products import products

pytestmark = pytest.mark.skipif(products(torch.device("cpu")) is None, reason="no compiled products")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("quality") / "model"
    write_checkpoint(made, "tiny", torch.float32)
    return made


def test_more_is_lost_the_fewer_bits_are_kept(folder: Path, tmp_path: Path) -> None:
    plain = measure_text(str(folder), None, most_tokens=600, cache=tmp_path)
    eight = measure_text(str(folder), "int8", most_tokens=600, cache=tmp_path)
    four = measure_text(str(folder), "int4", most_tokens=600, cache=tmp_path)
    assert plain.tokens == 600 and plain.top1_agreement == 1 and plain.kl_p99 < 1e-8
    assert 1e-8 < eight.kl_mean < four.kl_mean / 10 and eight.kl_mean < eight.kl_p99
    assert four.top1_agreement < eight.top1_agreement <= 1
    assert plain.perplexity == pytest.approx(plain.reference_perplexity, rel=1e-5)
    assert eight.perplexity != eight.reference_perplexity == plain.reference_perplexity
    assert four.held_bytes < eight.held_bytes < plain.held_bytes
    again = measure_text(str(folder), "int8", most_tokens=600, chunk=33, cache=tmp_path)
    assert again.kl_mean == pytest.approx(eight.kl_mean, rel=1e-2), "chunks change nothing"
    console = Console(width=100)
    with console.capture() as shown:
        console.print(text_table([plain, eight, four]))
    assert "int4" in shown.get() and f"{four.top1_agreement:.2%}" in shown.get()


def test_the_command_writes_both(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    asked = ["quality", "--model", str(folder), "--quantize", "none", "--tokens", "20", "--out", str(file)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and PASSAGE.name in done.output
    (found,) = json.loads(file.read_text())
    assert found["quantize"] == "none" and found["tokens"] == 20
    printed = CliRunner().invoke(app, [*asked[:-2], "--json"])
    assert json.loads(printed.stdout)[0]["tokens"] == 20
    blocks = write_gguf(tmp_path / "blocks.gguf", make_oracle("llama"), "llama", quant="Q4_0")
    alone = CliRunner().invoke(app, ["quality", "--model", str(blocks), "--tokens", "20", "--json"])
    assert [one["quantize"] for one in json.loads(alone.stdout)] == ["none"]
    refused = CliRunner().invoke(app, ["quality", "--model", str(blocks), "--quantize", "int8"])
    assert refused.exit_code == 2 and "already" in refused.output
    wrong = CliRunner().invoke(app, ["quality", "--quantize", "int3"])
    assert wrong.exit_code == 2 and "int3" in wrong.output
    missing = CliRunner().invoke(app, ["quality", "--model", "no-such-model"])
    assert missing.exit_code == 2 and "no-such-model" in missing.output


def test_memory_that_is_shared_counts_once(folder: Path) -> None:
    with torch.inference_mode():
        model = load_model(
            open_source(locate(str(folder))), torch.device("cpu"), torch.float32, lambda *_: None
        )
    before = held_bytes(model)
    assert before >= model.weight_bytes // 2
    shared = torch.zeros(1000)
    model.extra = [shared, shared[10:], PackedLinear(torch.randn(64, 64))]  # type: ignore[attr-defined]
    assert before + 4000 + 2 * 64 * 64 <= held_bytes(model) <= before + 4000 + 5 * 64 * 64


def test_points_of_the_examination() -> None:
    line: dict[str, Any] = dict.fromkeys(("exact", "count", "iou", "point", "absent"), 0.5)
    first = line | {"quantize": "none", "scenes": 3, "n": 40}
    console = Console(width=120)
    with console.capture() as shown:
        console.print(pocket_table([first, first | {"quantize": "int8", "exact": 0.495}]))
    assert "49.50 (-0.50)" in shown.get() and "40 questions" in shown.get()
