"""The plan of memory: equal to what loading holds, for every kind of weights, and what is decided by it."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from tests.unit.worker.models.small_checkpoint import write_checkpoint
from tests.unit.worker.models.test_load_memory import write_llama
from worker import resolve, startup
from worker.config import ConfigError, WorkerConfig
from worker.device.cpu import CpuDevice
from worker.device.memory import FreeMemory
from worker.formats.locate import locate
from worker.formats.open_source import open_source
from worker.formats.source import Source
from worker.models.held import held_bytes
from worker.models.registry import load_model
from worker.native.library import load
from worker.native.quantised_source import QuantisedSource
from worker.resolve import choose_kv_dtype, count_pages
from worker.step.kv_memory import kv_memory
from worker.step.memory_plan import GATEWAY_BYTES, MemoryPlan, fit, plan_memory

MB = 1 << 20
CPU = CpuDevice()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("planned"), dim=256, layers=3, vocab=4096)


def plan_of(path: Path, config: WorkerConfig, dtype: torch.dtype = torch.float32) -> MemoryPlan:
    return plan_memory(config, CPU, open_source(path), dtype, config.quantize)


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("bfloat16", None), ("float32", None), ("float32", "int8"), ("float32", "int4")]
)
def test_weights_are_those_that_loading_holds(
    folder: Path, tmp_path: Path, dtype: str, quantize: Any
) -> None:
    if quantize is not None and load() is None:
        pytest.skip("no compiled products")
    config = WorkerConfig(quantize=quantize, model=str(folder))
    kept = getattr(torch, dtype)
    planned = plan_of(folder, config, kept).weight_bytes
    source: Source = open_source(folder)
    source = source if quantize is None else QuantisedSource(source, quantize, tmp_path)
    with torch.inference_mode():
        held = held_bytes(load_model(source, torch.device("cpu"), kept, lambda *_: None))
    assert abs(planned - held) < 0.02 * held


@pytest.mark.parametrize("name", ["pocket", "moondream"])
def test_models_that_read_pictures(name: str, tmp_path: Path) -> None:
    path = locate("pocket") if name == "pocket" else write_checkpoint(tmp_path)
    plan = plan_of(path, WorkerConfig(feature_bytes=7 * MB))
    with torch.inference_mode():
        model = load_model(open_source(path), torch.device("cpu"), torch.float32, lambda *_: None)
    assert abs(plan.weight_bytes - held_bytes(model)) < 0.1 * held_bytes(model)
    assert plan.feature_bytes == 7 * MB and plan.picture_bytes > 0


def test_pages_are_as_large_as_they_are_made(folder: Path) -> None:
    for config in (
        WorkerConfig(kv_bytes=2 * MB),
        WorkerConfig(kv_bytes=2 * MB, dtype="float32"),
        WorkerConfig(num_pages=9),
    ):
        dtype = torch.float32
        plan = plan_of(folder, config, dtype)
        with torch.inference_mode():
            model = load_model(open_source(folder), torch.device("cpu"), dtype, lambda *_: None)
        choose_kv_dtype(config, model)
        pages = config.num_pages or count_pages(config, CPU, model, model.card.context_tokens)
        shape = resolve.step_shape(config, model.card, pages)
        memory = kv_memory(model, shape, CPU)
        assert pages == plan.most_pages
        assert sum(part.nbytes for part in (*memory.keys, *memory.values)) == pages * plan.page_bytes


def free(num_bytes: int) -> FreeMemory:
    return FreeMemory(num_bytes, "the control group /x's limit of 1.00 GB")


def test_what_fits_is_left_alone(folder: Path) -> None:
    config = WorkerConfig(kv_bytes=4 * MB)
    found, plan, _ = fit(
        config, CPU, open_source(folder), torch.float32, free(plan_of(folder, config).total_bytes)
    )
    assert found is config and "weights" in {part.name for part in plan.parts()}
    assert fit(config, CPU, open_source(folder), torch.float32, FreeMemory(0, "MemAvailable"))[0] is config


def test_fewer_pages_where_memory_is_short(folder: Path) -> None:
    config = WorkerConfig(kv_bytes=64 * MB)
    plan = plan_of(folder, config)
    short = free((plan.total_bytes + plan.least_bytes) // 2)
    found, _, _ = fit(config, CPU, open_source(folder), torch.float32, short)
    assert plan.least_pages * plan.page_bytes <= found.kv_bytes < config.kv_bytes
    assert plan.fixed_bytes + found.kv_bytes <= short.num_bytes


def test_features_give_way_before_pages_do(folder: Path) -> None:
    config = WorkerConfig()
    plan = plan_of(locate("pocket"), config)
    found, _, _ = fit(
        config, CPU, open_source(locate("pocket")), torch.float32, free(plan.fixed_bytes + 40 * MB)
    )
    assert found.feature_bytes == 10 * MB and found.kv_bytes == 30 * MB
    least, _, _ = fit(config, CPU, open_source(locate("pocket")), torch.float32, free(plan.least_bytes))
    assert least.feature_bytes == 0 and least.kv_bytes == plan.least_pages * plan.page_bytes


def test_what_does_not_fit_is_refused_with_what_would(folder: Path) -> None:
    source = open_source(folder)
    config = WorkerConfig(step_tokens=64, mixed_tokens=40)  # so that weights are what counts
    plan = plan_of(folder, config)
    with pytest.raises(
        ConfigError, match=r"are free .the control group /x.*weights .* while they load.*smaller model"
    ):
        fit(config, CPU, source, torch.float32, free(GATEWAY_BYTES))
    with pytest.raises(ConfigError, match=r"num_pages is 40000.*a safe value is [1-9]"):
        many = config.model_copy(update={"num_pages": 40000})
        fit(many, CPU, source, torch.float32, free(plan.least_bytes + 30 * MB))
    if load() is None:
        return
    for made in ("int8", "int4"):
        narrow = plan_of(folder, config.model_copy(update={"quantize": made}))
        assert narrow.least_bytes < plan.least_bytes
        with pytest.raises(ConfigError, match=f"a safe value for quantize is {made}"):
            fit(config, CPU, source, torch.float32, free(narrow.least_bytes))


def write_headers(folder: Path) -> Path:
    """A folder of Qwen3 4B's shape whose weights are a hole in a file."""
    dim, ff, layers, vocab = 2560, 9728, 36, 151936
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (vocab, dim), "norm": (dim,)}
    for index in range(layers):
        for name, outputs in (("q", 4096), ("k", 1024), ("v", 1024)):
            shapes[f"layers.{index}.self_attn.{name}_proj"] = outputs, dim
        shapes[f"layers.{index}.self_attn.o_proj"] = dim, 4096
        shapes |= {f"layers.{index}.self_attn.{name}_norm": (128,) for name in "qk"}
        shapes |= {f"layers.{index}.mlp.{name}_proj": (ff, dim) for name in ("gate", "up")}
        shapes[f"layers.{index}.mlp.down_proj"] = dim, ff
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{index}.{name}"] = (dim,)
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[f"model.{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    sizes = {"hidden_size": dim, "intermediate_size": ff, "num_hidden_layers": layers, "vocab_size": vocab}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
    config = kind | sizes | heads | {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_four_billion_weights_on_8_gb_by_their_headers(tmp_path: Path) -> None:
    if load() is None:
        pytest.skip("no compiled products")
    source = open_source(write_headers(tmp_path))
    config = WorkerConfig(context=4096)
    with pytest.raises(ConfigError, match="a safe value for quantize is int8"):
        fit(config, CPU, source, torch.float32, free(7 << 30))
    eight = config.model_copy(update={"quantize": "int8"})
    fitted, plan, _ = fit(eight, CPU, source, torch.float32, free(7 << 30))
    assert fitted is eight and 4.1e9 < plan.weight_bytes < 4.4e9  # the table of words is the head
    with pytest.raises(ConfigError, match="a safe value for quantize is int4"):
        fit(config, CPU, source, torch.float32, free(9 << 29))


def test_a_family_that_cannot_be_counted_is_loaded_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.models.blank.load_model", lambda *_: torch.empty(1, device="meta").item())
    config = WorkerConfig(model=str(folder))
    with capture_logs() as told:
        assert resolve.fitted_settings(config, CPU, open_source(folder), torch.float32) is config
    assert told[0]["event"] == "memory_not_planned"


def test_a_worker_refuses_before_it_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.step.memory_plan.free_on", lambda device: free(GATEWAY_BYTES))
    monkeypatch.setattr(startup, "load_model", lambda *_: pytest.fail("loaded"))
    config = WorkerConfig(model=str(folder))
    with pytest.raises(ConfigError, match="this model takes"):
        resolve.fitted_settings(config, CPU, open_source(folder), torch.float32)
