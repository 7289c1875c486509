"""Moondream 3 against a plain second implementation; both layouts of names; however it is chunked and batched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.unit.worker.models.moondream3_oracle import PlainText3
from tests.unit.worker.models.paged_driver import Driver, Row, quiet, relative_error, same
from tests.unit.worker.models.small_checkpoint import write_checkpoint
from tests.unit.worker.models.small_checkpoint3 import (
    SECTIONS_3,
    older_layout_3,
    random_tensors_3,
    write_checkpoint_3,
)
from worker.formats.errors import CheckpointError
from worker.formats.folder import Folder
from worker.models.moondream import Moondream
from worker.models.moondream3 import Moondream3, Tau
from worker.models.registry import family_of, load_model
from worker.models.settings import Settings

TOLERANCE = 1e-4
CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Moondream:
    with torch.inference_mode():
        model = load_model(Folder(folder), CPU, dtype, quiet)
    assert isinstance(model, Moondream)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_3(tmp_path_factory.mktemp("third"))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def small(request: pytest.FixtureRequest, folder: Path) -> Moondream:
    return load(folder, torch.bfloat16 if request.param == "bf16" else torch.float32)


@pytest.fixture(scope="module")
def model(folder: Path) -> Moondream:
    return load(folder)


@pytest.fixture(scope="module")
def plain(model: Moondream) -> PlainText3:
    return PlainText3(random_tensors_3(), model.config.text)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(one) for one in torch.randint(10, 96, (count,), generator=generator)]


def inputs(model: Moondream, count: int, seed: int) -> Tensor:
    return model.embed(torch.tensor(ids(count, seed)))


def tolerance(model: Moondream) -> float:
    return 1e-5 if model.dtype == torch.float32 else 3e-2


def test_logits_with_and_without_a_picture(model: Moondream, plain: PlainText3) -> None:
    words = inputs(model, 60, 1)
    _, hidden = Driver(model).prefill(words, 0)
    expected = plain.logits(plain.hidden(plain.words(ids(60, 1)), []))
    assert relative_error(model.logits(hidden), expected) < TOLERANCE
    prefix = model.prefix_tokens
    _, hidden = Driver(model).prefill(words, prefix)
    expected = plain.logits(plain.hidden(plain.words(ids(60, 1)), [(0, prefix)]))
    assert relative_error(model.logits(hidden), expected) < TOLERANCE


def test_48_greedy_tokens(model: Moondream, plain: PlainText3) -> None:
    driver = Driver(model)
    prompt = ids(20, 2)
    row, hidden = driver.prefill(model.embed(torch.tensor(prompt)), 0)
    tokens = [int(model.logits(hidden[-1:]).argmax())]
    for _ in range(47):
        hidden = driver.step([(row, model.embed(torch.tensor(tokens[-1:])))])
        tokens.append(int(model.logits(hidden).argmax()))
    known = plain.words(prompt)
    for token in tokens:
        assert int(plain.logits(plain.hidden(known, [])[-1:]).argmax()) == token
        known = torch.cat([known, plain.words([token])])


def test_region_heads_and_their_encoders(model: Moondream, plain: PlainText3) -> None:
    hidden, values = torch.randn(5, 128), torch.rand(5, 2)
    region = model.region
    assert relative_error(region.coordinate_logits(hidden), plain.region("coord_decoder", hidden)) < TOLERANCE
    sizes = plain.region("size_decoder", hidden).view(5, 2, -1)
    assert relative_error(region.size_logits(hidden), sizes) < TOLERANCE
    bins = plain.region("coord_decoder", hidden).argmax(-1)
    assert torch.equal(region.decode_coordinate(hidden)[:, 0], bins / 64)
    embedded = region.encode_size(values, torch.float32)
    assert relative_error(embedded, plain.fourier(values, "size")) < TOLERANCE


@pytest.mark.parametrize("cuts", [[1] * 37, [5, 16, 16], [20, 17]])
def test_chunked_prompt_equals_whole(small: Moondream, cuts: list[int]) -> None:
    prompt = inputs(small, 37, seed=1)
    _, whole = Driver(small).prefill(prompt, 0)
    driver, row = Driver(small), Row()
    parts = [driver.step([], [(row, chunk, 0)]) for chunk in prompt.split(cuts)]
    assert relative_error(torch.cat(parts), whole) < tolerance(small)


def test_batched_rows_equal_single_rows_bit_for_bit(small: Moondream) -> None:
    lengths = [3, 40, 17, 64, 31, 1, 100]
    together, apart = (Driver(small, kv_dtype=small.kv_dtype) for _ in range(2))
    batch = [together.prefill(inputs(small, n, seed=n), 0)[0] for n in lengths]
    alone = [apart.prefill(inputs(small, n, seed=n), 0)[0] for n in lengths]
    for step in range(3):
        fed = [inputs(small, 1, seed=1000 + 10 * step + i) for i in range(len(lengths))]
        rows = together.step(list(zip(batch, fed, strict=True)), padding=step)
        logits = small.logits(rows)
        for index, row in enumerate(alone):
            single = apart.step([(row, fed[index])])
            assert same(rows[index : index + 1], single, tolerance(small))
            assert same(logits[index : index + 1], small.logits(single), tolerance(small))


def test_a_row_of_nan_leaves_the_others(model: Moondream) -> None:
    driver, clean = Driver(model), Driver(model)
    prompt, word = inputs(model, 20, seed=5), inputs(model, 1, seed=6)
    victim, neighbour = driver.prefill(prompt, 0)[0], driver.prefill(prompt, 0)[0]
    expected = clean.step([(clean.prefill(prompt, 0)[0], word)])
    out = driver.step([(victim, torch.full_like(word, float("nan"))), (neighbour, word)])
    assert out[0].isnan().any() and relative_error(out[1:], expected) < 1e-5


@pytest.mark.parametrize("joined", [True, False])
def test_the_older_layout_is_the_same_model(model: Moondream, tmp_path: Path, joined: bool) -> None:
    tensors = older_layout_3(random_tensors_3(), fp8=False, joined=joined)
    assert (
        "text_model.transformer.h.1.mlp.experts.weight" in tensors
        and "region_model.size_head.bias" in tensors
    )
    other = load(write_checkpoint_3(tmp_path, tensors))
    words = inputs(model, 20, 3)
    found, expected = (Driver(one).prefill(words, 0)[1] for one in (other, model))
    assert torch.equal(found, expected)


def test_experts_in_fp8_with_a_scale_a_row(tmp_path: Path) -> None:
    """As 3.1 is released: the same numbers as their products, rounded by nobody else."""
    stored = older_layout_3(random_tensors_3(), fp8=True, joined=True)
    assert stored["text_model.transformer.h.1.mlp.experts.weight"].dtype == torch.float8_e4m3fn
    widened = random_tensors_3()
    for layer in (1, 2):
        of_layer = f"text_model.transformer.h.{layer}"
        for ours, theirs, scale in (("fc1", "experts", "up"), ("fc2", "output_experts", "down")):
            rows = stored[f"{of_layer}.moe_quant.{scale}_scale"].unsqueeze(-1)
            weight = stored[f"{of_layer}.mlp.{theirs}.weight"].float() * rows
            widened[f"model.text.blocks.{layer}.mlp.{ours}.weight"] = weight
    found, expected = (
        load(write_checkpoint_3(tmp_path / "fp8", stored)),
        load(write_checkpoint_3(tmp_path / "wide", widened)),
    )
    words = inputs(found, 20, 4)
    assert torch.equal(*(Driver(one).prefill(words, 0)[1] for one in (found, expected)))
    del stored["text_model.transformer.h.2.moe_quant.up_scale"]
    save_file(stored, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(CheckpointError, match="F8_E4M3 without scales of its rows"):
        load(tmp_path / "fp8")


@pytest.mark.parametrize(
    "named",
    [
        {"architectures": ["HfMoondream"], "model_type": "moondream3"},
        {"architectures": ["HfMoondream"], "model_type": "moondream1"},
        {"model_type": "moondream3"},
        {"architectures": ["Moondream3ForCausalLM"]},
        {"architectures": None},
    ],
    ids=str,
)
def test_however_it_is_named(named: dict[str, Any], tmp_path: Path) -> None:
    """3.1's config.json names no architecture; then its tensors tell."""
    assert isinstance(load(write_checkpoint_3(tmp_path, **named)), Moondream3)


def test_a_config_that_says_nothing_is_told_by_its_tensors(tmp_path: Path) -> None:
    """Which generation, and what is usual there."""
    sections = {name: dict(section) for name, section in SECTIONS_3.items()}
    write_checkpoint_3(tmp_path, random_tensors_3(), sections, architectures=["HfMoondream"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["config"]["text"]["max_context"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert model.config.text.rope_theta == 1.5e6 and model.card.context_tokens == 32768
    second = load(write_checkpoint(tmp_path / "second"))
    assert not isinstance(second, Moondream3) and second.config.text.rope_theta == 1e4


def test_card(model: Moondream) -> None:
    card = model.card
    assert card.family == "moondream3"
    assert card.capabilities == ["chat", "query", "caption", "detect", "point", "segment"]
    templates = card.templates
    assert templates["query_suffix"] == [3] and templates["reasoning_suffix"] == [4]
    assert templates["reasoning_end"] == [] and templates["reasoning_close"] == [3]
    assert templates["segment_prefix"] == [1, 17374, 2] and templates["segment_suffix"] == [3]


def test_prompts_as_the_makers_engine_spells_them(tmp_path: Path) -> None:
    query = {"prefix": [1, 2], "answer_prefix": [7], "reasoning_prefix": [8, 9], "post_reasoning_prefix": [5]}
    sections = SECTIONS_3 | {"tokenizer": {"templates": {"query": query}}}
    templates = load(write_checkpoint_3(tmp_path, random_tensors_3(), sections)).card.templates
    assert [templates[f"query_{part}"] for part in ("prefix", "suffix")] == [[1, 2], [7]]
    assert templates["reasoning_suffix"] == [8, 9] and templates["reasoning_end"] == [5]
    assert "query_answer_prefix" not in templates and "segment_prefix" not in templates


def test_a_step_reads_the_chosen_experts(model: Moondream) -> None:
    experts = 2 * 8 * (64 * 128 + 128 * 32) * 4  # two layers of eight, fp32
    whole = Moondream.step_bytes.fget(model)  # type: ignore[attr-defined]
    assert model.step_bytes == pytest.approx(whole - experts * 5 / 8, rel=0.02)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moe": {"num_experts": 2}}, "text.moe: experts_per_token"),
        ({"moe": {"num_expert": 2}}, "unknown setting 'text.moe.num_expert'"),
        ({"moe": 3}, "'text.moe' is not an object"),
        ({"n_kv_heads": 2}, "as many n_kv_heads as n_heads"),
        ({"tau_attn": 1}, "'text.tau_attn' is 1, not true or false"),
        ({"tau_attn": False}, "tau_attn and moe come together"),
        ({"rope_theta": 0}, "'text.rope_theta' is 0, not a number above 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_run(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    sections = SECTIONS_3 | {"text": SECTIONS_3["text"] | change}
    with pytest.raises(CheckpointError, match=said):
        load(write_checkpoint_3(tmp_path, {"x": torch.zeros(1)}, sections, model_type="moondream3"))


def test_the_previews_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["HfMoondream"], "model_type": "moondream3"})
    )
    (tmp_path / "model_fp8.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"model_fp8\.pt"):
        load(tmp_path)


def test_the_family_of_a_folder(folder: Path) -> None:
    settings = Settings(json.loads((folder / "config.json").read_text()), folder / "config.json")
    assert family_of(settings).title.startswith("Moondream 3")


def test_heads_are_scaled_up_to_the_end_of_the_context(model: Moondream) -> None:
    """Positions 0 to 32767: α · ln(p + 1) of both signs, saturated and not."""
    config, heads = model.config.text, model.config.text.n_heads
    alpha = torch.tensor([-40.0, -0.5, 0.25, 40.0])
    content = torch.randn(2 * heads, config.qkv_dim) / config.qkv_dim**0.5
    given = {"tau.wqwv": content, "tau.alpha": alpha}
    tau = Tau(lambda name, *shape, **_: given[name], "tau", config, torch.arange(config.qkv_dim))
    positions = torch.tensor([0, 1, 1000, 32767]).unsqueeze(1)
    qkv = torch.randn(4, config.qkv_dim)
    q, k, v = qkv.clone().view(4, 3, heads, -1).unbind(1)
    said = (F.gelu(qkv, approximate="tanh") @ content.t()).tanh() + 0.5
    by_position = torch.sigmoid(alpha * (positions + 1.0).log())
    expected = [
        q * (said[:, :heads] + by_position).unsqueeze(-1),
        k,
        v * (said[:, heads:] + by_position).unsqueeze(-1),
    ]
    found = tau(qkv, (positions.float() + 1).log())
    assert relative_error(found.view(4, 3, heads, -1), torch.stack(expected, 1)) < 1e-6


@pytest.mark.slow
def test_a_long_prompt_in_chunks(plain: PlainText3, tmp_path: Path) -> None:
    """Well beyond the second generation's context, in the third's usual one."""
    sections = SECTIONS_3 | {"text": {k: v for k, v in SECTIONS_3["text"].items() if k != "max_context"}}
    wide = load(write_checkpoint_3(tmp_path, random_tensors_3(), sections, model_type="moondream3"))
    assert wide.card.context_tokens == 32768
    prompt = ids(2300, 9)
    driver, row = Driver(wide), Row()
    parts = [
        driver.step([], [(row, one, 0)]) for one in wide.embed(torch.tensor(prompt)).split([1000, 1, 1299])
    ]
    expected = plain.logits(plain.hidden(plain.words(prompt), [])[-40:])
    assert relative_error(wide.logits(torch.cat(parts)[-40:]), expected) < TOLERANCE
