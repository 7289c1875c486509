"""A tied table of words is the head's own weight: rows with the same bits, and no second copy held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.worker.formats.tiny_gguf import make_oracle, write_gguf
from tests.unit.worker.models.dense_oracle import write
from tests.unit.worker.models.paged_driver import quiet
from worker.formats.open_source import open_source
from worker.models.blank import blank_model
from worker.models.contract import Model
from worker.models.held import held_bytes
from worker.models.planned import planned
from worker.models.registry import load_model
from worker.native.library import torch_alone
from worker.native.products import products
from worker.native.quantised_source import QuantisedSource

CPU = torch.device("cpu")
IDS = torch.tensor([0, 511, 7, 7, 300])
found = products(CPU)
pytestmark = pytest.mark.skipif(
    found is None or not found.multiplies(torch.float32), reason="no compiled products"
)


def load(path: Path, dtype: torch.dtype, made: str | None = None) -> Model:
    source = open_source(path)
    chosen = source if made is None else QuantisedSource(source, made, path.parent / "cache")
    with torch.inference_mode():
        return load_model(chosen, CPU, dtype, quiet)


def embedded(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        return model.embed(IDS)


def check_plan(path: Path, model: Model, dtype: torch.dtype, made: str | None = None) -> None:
    """What is counted from the headers is what the model holds."""
    blank, stored = blank_model(open_source(path), dtype, made=made, reads_blocks=True)
    count = planned(blank, stored, CPU, dtype).weight_bytes
    assert abs(count - held_bytes(model)) < 0.08 * held_bytes(model)  # a second table would be a third


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    assert found is not None
    if not found.can_multiply(dtype, 96, 512):
        pytest.skip("not packed here")
    write(tmp_path, "qwen2", vocab_size=512, hidden_size=96, tie_word_embeddings=True)
    model = load(tmp_path, dtype)
    with torch_alone():
        plain = load(tmp_path, dtype)
    assert torch.equal(embedded(model), embedded(plain))
    check_plan(tmp_path, model, dtype)
    with pytest.raises(IndexError):
        model.embed(torch.tensor([512]))


def test_an_untied_table_is_a_table(tmp_path: Path) -> None:
    write(tmp_path, "qwen2", vocab_size=512, hidden_size=96, tie_word_embeddings=False)
    model = load(tmp_path, torch.float32)
    with torch_alone():
        assert torch.equal(embedded(model), embedded(load(tmp_path, torch.float32)))
    check_plan(tmp_path, model, torch.float32)


@pytest.mark.parametrize("made", ["int8", "int4"])
def test_a_tied_table_is_rounded_with_the_head(tmp_path: Path, made: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, "qwen2", vocab_size=512, hidden_size=96, tie_word_embeddings=True)
    model, plain = load(folder, torch.float32, made), load(folder, torch.float32)
    off = (embedded(model) - embedded(plain)).norm() / embedded(plain).norm()
    assert 0 < float(off) < 0.01, "eight bits"
    assert model.num_weights == plain.num_weights
    check_plan(folder, model, torch.float32, made)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_1", "F16"])
def test_a_files_blocks(tmp_path: Path, quant: str) -> None:
    oracle = make_oracle("qwen2", vocab_size=512, tie_word_embeddings=True)
    file = write_gguf(tmp_path / "model.gguf", oracle, "qwen2", quant=quant)
    model = load(file, torch.float32)
    with torch_alone():
        assert torch.equal(embedded(model), embedded(load(file, torch.float32)))
    check_plan(file, model, torch.float32)
