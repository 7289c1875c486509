"""Float models rounded to blocks as they load: how near, kept how, refused when."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from tests.unit.worker.formats.tiny_gguf import make_oracle, write_gguf
from tests.unit.worker.models.dense_oracle import write
from tests.unit.worker.models.paged_driver import Driver, quiet, relative_error
from tests.unit.worker.models.small_checkpoint import write_checkpoint
from tests.unit.worker.models.small_checkpoint3 import older_layout_3, random_tensors_3, write_checkpoint_3
from worker.config import ConfigError, WorkerConfig
from worker.device.choices import without
from worker.formats.errors import CheckpointError
from worker.formats.open_source import open_source
from worker.models.contract import Model
from worker.models.registry import load_model
from worker.native.library import torch_alone
from worker.native.products import products
from worker.native.quantised import Levels, QuantisedWeight, beside
from worker.native.quantised_source import QuantisedSource
from worker.native.quantiser import fits, to_blocks
from worker.resolve import refuse_quantize

pytestmark = pytest.mark.usefixtures("exact_activations")
CPU = torch.device("cpu")
needs_products = pytest.mark.skipif(
    (found := products(CPU)) is None or not found.multiplies(torch.float32), reason="no compiled products"
)


def rounded(weight: torch.Tensor, kind: str) -> QuantisedWeight:
    return QuantisedWeight(kind, weight.shape[0], weight.shape[1], to_blocks(weight, kind))


def error_of(weight: torch.Tensor, kind: str) -> float:
    made = rounded(weight, kind)
    return float((made.dequantised() - weight).norm() / weight.norm())


def test_a_searched_scale_beats_the_nearest_levels() -> None:
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    weight = torch.randn(300, 256) * torch.rand(300, 1)
    for kind, most in (("Q8_0", 1.001), ("Q4_1", 0.94)):
        named = getattr(gguf.GGMLQuantizationType, kind)
        plain = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), named), named))
        assert error_of(weight, kind) < most * float((plain - weight).norm() / weight.norm())


def test_levels_that_fit_are_found_again() -> None:
    torch.manual_seed(1)
    levels = torch.randint(0, 16, (40, 64)).float()
    levels[:, ::32], levels[:, 1::32] = 0, 15
    assert error_of(levels / 8 - 0.75, "Q4_1") < 1e-6


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_odd_blocks(kind: str) -> None:
    """Zeros, one value throughout, one outlier, both signs, numbers too small for a 16-bit scale: finite, and near."""
    weight = torch.zeros(5, 32)
    weight[1], weight[2, 7], weight[3], weight[4] = -0.75, 100.0, torch.linspace(-1, 1, 32), 1e-9
    made = QuantisedWeight(kind, 5, 32, to_blocks(weight, kind)).dequantised()
    assert made.isfinite().all() and torch.equal(made[0], weight[0])
    assert relative_error(made[1], weight[1]) < 1e-2 and relative_error(made[2], weight[2]) < 1e-2
    assert relative_error(made[3], weight[3]) < 0.04 and float(made[4].abs().max()) < 1e-6


def test_what_blocks_cannot_hold_stays_as_it_is() -> None:
    assert fits(torch.ones(3, 64))
    for weight in (torch.ones(3, 48), torch.full((3, 32), float("nan")), torch.full((3, 32), 1e9)):
        assert not fits(weight)


def test_inputs_beside_each_other() -> None:
    torch.manual_seed(2)
    parts = [torch.randn(4, 64), torch.randn(4, 32)]
    for kinds, kept in ((("Q4_1", "Q4_1"), QuantisedWeight), (("Q4_1", "Q8_0"), Levels)):
        made = [rounded(part, kind) for kind, part in zip(kinds, parts, strict=True)]
        joined = beside(made)
        assert isinstance(joined, kept)
        assert torch.equal(joined.dequantised(), torch.cat([part.dequantised() for part in made], 1))


def load(folder: Path, made: str | None, cache: Path) -> Model:
    source = open_source(folder)
    chosen = source if made is None else QuantisedSource(source, made, cache)
    with torch.inference_mode():
        return load_model(chosen, CPU, torch.float32, quiet)


@torch.inference_mode()
def logits(model: Model) -> torch.Tensor:
    _, hidden = Driver(model, num_pages=8).prefill(model.embed(torch.tensor([5, 9, 33, 7])), 0)
    return model.logits(hidden)


def values(kind: str, rows: int, columns: int, blocks: torch.Tensor) -> torch.Tensor:
    return QuantisedWeight(kind, rows, columns, blocks).dequantised()


@needs_products
@pytest.mark.parametrize("family", ["llama", "granite", "moondream", "moondream3"])
def test_a_model_loads_in_fewer_bytes_and_answers_as_its_blocks_say(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    if family == "moondream":
        write_checkpoint(folder)
    elif family == "moondream3":
        write_checkpoint_3(folder, older_layout_3(random_tensors_3(), fp8=True))
    else:
        folder.mkdir()
        write(folder, family, hidden_size=96, num_hidden_layers=1)
    plain = load(folder, None, tmp_path)
    for made, most, share in (("int8", 0.06, 0.5), ("int4", 2.0, 0.45)):
        fewer = load(folder, made, tmp_path)
        assert 1e-5 < relative_error(logits(fewer), logits(plain)) < most
        with monkeypatch.context() as patch:
            patch.setattr("worker.models.taking.QuantisedWeight", values)
            assert relative_error(logits(fewer), logits(load(folder, made, tmp_path))) < 1e-4
        assert fewer.weight_bytes < share * plain.weight_bytes and fewer.num_weights == plain.num_weights
        with torch_alone():  # where nothing multiplies by blocks, none are asked for
            assert torch.equal(logits(load(folder, made, tmp_path)), logits(load(folder, None, tmp_path)))


@needs_products
def test_the_second_load_rounds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = write_checkpoint(tmp_path / "model"), tmp_path / "cache"
    first = logits(load(folder, "int4", cache))
    kept = list((cache / "quantised").iterdir())
    assert len(kept) == 1 and kept[0].stat().st_mode & 0o077 == 0

    def never(weight: torch.Tensor, kind: str, out: torch.Tensor) -> bool:
        raise AssertionError("rounded again")

    with monkeypatch.context() as patch:
        patch.setattr("worker.native.quantised_source.round_into", never)
        assert torch.equal(logits(load(folder, "int4", cache)), first)
        with pytest.raises(AssertionError, match="again"):
            load(folder, "int8", cache)
    load(folder, "int8", cache)
    damaged = next(kept[0].glob("*attn.qkv.weight"))
    damaged.write_bytes(b"short")
    assert torch.equal(logits(load(folder, "int4", cache)), first), "what is damaged is made again"
    old = time.time() - 9999
    os.utime(folder / "model.safetensors", (old, old))
    load(folder, "int4", cache)
    now = [path.name for path in (cache / "quantised").iterdir()]
    assert len(now) == 2 and kept[0].name not in now, "older contents of the same files are cleared away"
    monkeypatch.setattr("worker.native.quantised_cache.VERSION", 99)
    load(folder, "int4", cache)
    later = {path.name for path in (cache / "quantised").iterdir()}
    assert len(later) == 2 and len(later & set(now)) == 1, "another quantiser, other blocks"


@needs_products
def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (tmp_path / "file").write_text("no folder")
    first = logits(load(folder, "int8", tmp_path / "file"))
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert torch.equal(logits(load(folder, "int8", open_to_all)), first)
    assert not list(open_to_all.iterdir()), "others could put weights there"


@needs_products
def test_a_file_of_blocks_is_refused_and_one_of_floats_is_not(tmp_path: Path) -> None:
    oracle = make_oracle("llama")
    with pytest.raises(CheckpointError, match=r"quantised already, as Q4_0.*leave it out"):
        load(write_gguf(tmp_path / "q.gguf", oracle, "llama", quant="Q4_0"), "int8", tmp_path / "cache")
    file = write_gguf(tmp_path / "f.gguf", oracle, "llama", quant="F16")
    assert (
        relative_error(logits(load(file, "int8", tmp_path / "cache")), logits(load(file, None, tmp_path)))
        < 0.08
    )
    names = json.loads(next((tmp_path / "cache" / "quantised").glob("f-int8*/index.json")).read_text())
    assert names["lm_head.weight"][0] == "Q8_0" and "model.norm.weight" not in names


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"dtype bfloat16.*safe value for dtype is auto"):
        refuse_quantize(WorkerConfig(quantize="int8", dtype="bfloat16"), CPU)
    monkeypatch.setattr("worker.native.library.load", lambda: None)
    with pytest.raises(ConfigError, match=r"no compiled products.*g\+\+ or clang.*none"):
        refuse_quantize(WorkerConfig(quantize="int4"), CPU)
    refuse_quantize(WorkerConfig(quantize="int4"), torch.device("cuda"))
    with without("narrow_weights"), pytest.raises(ConfigError, match="turns narrow_weights off"):
        refuse_quantize(WorkerConfig(quantize="int4"), torch.device("cuda"))
