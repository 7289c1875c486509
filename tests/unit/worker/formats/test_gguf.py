"""A model in a GGUF file is the model: same settings, tensors and logits as transformers has of its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from tests.unit.worker.formats.tiny_gguf import (
    SIZES,
    add_byte_tokens,
    add_setting,
    apart,
    close,
    make_oracle,
    write_gguf,
)
from tests.unit.worker.models.paged_driver import Driver, quiet, relative_error
from worker.formats.gguf import Gguf, sampling_of
from worker.formats.gguf_blocks import unpacker
from worker.formats.gguf_container import read_container
from worker.formats.gguf_tokenizer import chat_templates
from worker.formats.open_source import open_source
from worker.formats.source import CheckpointError, Target
from worker.models.registry import load_model

pytestmark = pytest.mark.usefixtures("exact_activations")
CPU = torch.device("cpu")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# architecture → transformers' model_type and settings, and what the file says beside what all say.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": ROPE}, {}),
    "qwen2": ("qwen2", {"rope_parameters": ROPE, "head_dim": 16}, {"attention.key_length": None}),
    "qwen3": ("qwen3", {"rope_parameters": ROPE}, {"attention.value_length": 32}),
    "qwen3moe": (
        "qwen3_moe",
        {
            "rope_parameters": ROPE,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "lfm2": (
        "lfm2",
        {
            "rope_parameters": ROPE,
            "head_dim": 16,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": True,
        },
        {
            "attention.key_length": None,
            "attention.head_count_kv": [0, 2],
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 16,
            "shortconv.l_cache": 3,
        },
    ),
    "phi3": (
        "phi3",
        {
            "rope_parameters": ROPE,
            "head_dim": 16,
            "sliding_window": 100,
            "original_max_position_embeddings": 512,
        },
        {"attention.sliding_window": 100, "rope.dimension_count": 16},
    ),
    "gemma2": (
        "gemma2",
        {"sliding_window": 64, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        {
            "attention.sliding_window": 64,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.key_length": 32,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 64, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        {"attention.sliding_window": 64, "rope.freq_base": 1000000.0},
    ),
    "olmo2": ("olmo2", {"rope_parameters": ROPE, "head_dim": 16}, {"attention.key_length": None}),
    "granite": (
        "granite",
        {
            "rope_parameters": ROPE,
            "head_dim": 16,
            "attention_multiplier": 0.0625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        {
            "attention.scale": 0.0625,
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "logit_scale": 8.0,
            "attention.key_length": None,
            "rope.dimension_count": 16,
        },
    ),
    "smollm3": (
        "smollm3",
        {"rope_parameters": ROPE, "head_dim": 16},
        {"attention.key_length": None, "rope.dimension_count": 16},
    ),
    "stablelm": (
        "stablelm",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}, "use_qkv_bias": True, "head_dim": 16},
        {
            "attention.key_length": None,
            "attention.layer_norm_rms_epsilon": None,
            "attention.layer_norm_epsilon": 1e-5,
            "rope.dimension_count": 4,
            "use_parallel_residual": False,
        },
    ),
}


def written(folder: Path, architecture: str, quant: str = "Q8_0", **more: Any) -> tuple[Path, Any]:
    model_type, settings, said = KINDS[architecture]
    oracle = make_oracle(model_type, **settings)
    path = folder / f"{architecture}.gguf"
    return write_gguf(path, oracle, architecture, quant=quant, settings={**said, **more}), oracle


def take_all(source: Gguf) -> dict[str, torch.Tensor]:
    tensors = source.open(quiet)
    found = {
        name: tensors.take(name, *stored.shape, device=CPU, dtype=torch.float32)
        for name, (stored, _) in tensors._tensors.items()
    }
    tensors.finish()
    return found


def rounded(value: Any) -> Any:
    """The same with its numbers to the six digits that a file's 32 bits keep."""
    if isinstance(value, dict):
        plain = {"partial_rotary_factor": 1.0}
        return {key: rounded(inner) for key, inner in value.items() if plain.get(key) != inner}
    return float(f"{value:.6g}") if isinstance(value, float) else value


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_settings_and_tensors_are_transformers_own(tmp_path: Path, architecture: str) -> None:
    path, oracle = written(tmp_path, architecture)
    source = Gguf(path)
    found = take_all(source)
    expected = dict(apart(oracle.state_dict()))
    if oracle.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name].float().reshape(tensor.shape), rtol=0, atol=2e-6), name
    config = AutoConfig.for_model(**source.config).to_dict()
    want = oracle.config.to_dict()
    skipped = {
        *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "dtype"),
        *("rms_norm_eps", "_name_or_path", "transformers_version", "layer_norm_eps", "attn_implementation"),
    }
    differing = {
        name: (config.get(name), value)
        for name, value in want.items()
        if name not in skipped and rounded(config.get(name)) != rounded(value)
    }
    assert not differing
    assert source.config["architectures"] == [type(oracle).__name__]


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_logits_are_those_of_the_dequantised_weights(tmp_path: Path, architecture: str, quant: str) -> None:
    path, oracle = written(tmp_path, architecture, quant)
    check_logits(path, oracle)


def check_logits(path: Path, oracle: Any) -> None:
    model = load_model(open_source(path), CPU, torch.float32, quiet)
    ids = torch.randint(0, SIZES["vocab_size"], (40,), generator=torch.Generator().manual_seed(1))
    _, hidden = Driver(model).prefill(model.embed(ids), 0)
    assert relative_error(model.logits(hidden), oracle(ids[None]).logits[0].detach()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_each_served_family_answers_from_gguf(tmp_path: Path, architecture: str) -> None:
    path, oracle = written(tmp_path, architecture)
    check_logits(path, oracle)


def test_a_llama_with_biases_on_q_k_and_v_alone_is_a_qwen2(tmp_path: Path) -> None:
    oracle = make_oracle("qwen2", rope_parameters=ROPE, head_dim=16)
    path = write_gguf(
        tmp_path / "m.gguf",
        oracle,
        "llama",
        settings={"attention.key_length": None, "rope.dimension_count": 16},
    )
    source = Gguf(path)
    assert source.config["architectures"] == ["Qwen2ForCausalLM"]
    bias = take_all(source)["model.layers.1.self_attn.k_proj.bias"]
    assert torch.equal(bias, oracle.state_dict()["model.layers.1.self_attn.k_proj.bias"])


def test_taken_as_blocks_equals_taken_as_values(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "llama", "Q4_1")
    name, shape = "model.layers.0.self_attn.q_proj.weight", (128, 64)
    tensors = Gguf(path).open(quiet)
    packed = tensors.take_packed(name, *shape)
    assert packed is not None and packed.type == "Q4_1" and packed.data.shape == (128, 40)
    unpack = unpacker("Q4_1")
    assert unpack is not None
    values = unpack(packed.data.view(-1, 20)).view(shape)
    assert torch.equal(values, tensors.take(name, *shape, device=CPU, dtype=torch.float32))
    assert tensors.take_packed("model.norm.weight", 64) is None
    with pytest.raises(CheckpointError, match="not of the shape"):
        tensors.take_packed(name, 64, 64)


@pytest.mark.parametrize("quant", ["F32", "Q4_1"])
def test_weights_are_counted_however_they_are_packed(tmp_path: Path, quant: str) -> None:
    """A step's cost is guessed from their number."""
    path, oracle = written(tmp_path, "llama", quant)
    model = load_model(Gguf(path), CPU, torch.float32, quiet)
    assert model.num_weights == sum(one.numel() for one in oracle.parameters())
    assert (model.weight_bytes < 4 * model.num_weights) == (quant != "F32")


def test_what_a_family_asks_for_and_what_it_leaves(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "llama")
    seen: list[tuple[float, float]] = []
    tensors = Gguf(path).open(
        lambda phase, done, total: seen.append((done, total)), lambda name: Target(name)
    )
    with pytest.raises(CheckpointError, match="missing"):
        tensors.take("model.layers.9.mlp.up_proj.weight", 96, 64, device=CPU, dtype=torch.float32)
    tensors.take("model.norm.weight", 64, device=CPU, dtype=torch.float32)
    assert seen == [(256, tensors.num_bytes)]
    with pytest.raises(CheckpointError, match=r"does not know: blk\.0.* more"):
        tensors.finish()


def rope_file(folder: Path, divisors: np.ndarray | None = None, **said: Any) -> Gguf:
    oracle = make_oracle("llama", rope_parameters=ROPE, num_hidden_layers=1)
    path = folder / "rope.gguf"
    if divisors is None:
        return Gguf(write_gguf(path, oracle, "llama", settings=said))
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **said,
    }.items():
        add_setting(writer, f"llama.{name}", value)
    add_byte_tokens(writer, 320)
    writer.add_tensor("token_embd.weight", np.zeros((320, 64), np.float32))
    writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    return Gguf(close(writer, path))


def llama3_divisors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    found = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        smooth = (8192 / wavelength - 1) / 3
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stretched_frequencies_of_llama3_are_recognised(tmp_path: Path, factor: float) -> None:
    source = rope_file(tmp_path, llama3_divisors(factor, 500000.0, 32), **{"rope.freq_base": 500000.0})
    found = source.config["rope_parameters"]
    assert found["rope_type"] == "llama3" and found["factor"] == factor
    assert found["original_max_position_embeddings"] == 8192 and found["rope_theta"] == 500000.0


def test_other_frequencies_are_handed_on_as_they_are(tmp_path: Path) -> None:
    divisors = np.linspace(1, 3, 16)
    found = rope_file(tmp_path, divisors).config["rope_parameters"]
    assert found["rope_type"] == "longrope" and found["attention_factor"] == 1.0
    assert found["short_factor"] == found["long_factor"] == pytest.approx(divisors, rel=1e-6)


def test_plain_frequencies_are_no_stretch(tmp_path: Path) -> None:
    assert rope_file(tmp_path, np.ones(16)).config["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_scaling_of_positions(tmp_path: Path, said: dict[str, Any], want: dict[str, Any]) -> None:
    found = rope_file(tmp_path, **said).config["rope_parameters"]
    assert want.items() <= found.items()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"embedding_length": None}, "'llama.embedding_length' is missing"),
        ({"block_count": "two"}, "expected a whole number"),
        ({"attention.head_count": [4, 2]}, "differs between layers"),
        ({"attention.head_count_kv": 3}, "no multiple of 3"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "finite"),
        ({"rope.scaling.type": "su"}, "'su'"),
        ({"attention.value_length": 16}, "not that of the keys"),
    ],
)
def test_settings_that_cannot_be_served(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        written(tmp_path, "llama", "F32", **said) and Gguf(tmp_path / "llama.gguf")
    assert caught.value.file == tmp_path / "llama.gguf"


@pytest.mark.parametrize(
    ("architecture", "extra", "words"),
    [
        ("mamba", {}, "'mamba' is not served; served are llama"),
        ("clip", {}, "an mmproj file"),
        ("llama", {"general.type": "adapter"}, "'adapter'"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, architecture: str, extra: dict[str, Any], words: str) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in extra.items():
        add_setting(writer, name, value)
    writer.add_tensor("v.weight", np.zeros((2, 2), np.float32))
    close(writer, path)
    with pytest.raises(CheckpointError, match=words):
        Gguf(path)


def split(path: Path, oracle: Any) -> list[Path]:
    """The same file in two parts, as `llama-gguf-split` names them."""
    writer = gguf.GGUFWriter(path.with_name("m"), "llama", split_max_tensors=11)
    del oracle
    reader = gguf.GGUFReader(path)
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            add_setting(writer, key, entry.contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(path.with_name("m.gguf"))
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("m-*.gguf"))


def test_a_model_in_parts(tmp_path: Path) -> None:
    path, oracle = written(tmp_path, "llama", "F32")
    parts = split(path, oracle)
    assert len(parts) == 2
    whole = take_all(Gguf(path))
    source = open_source(parts[1])  # any part will do
    assert isinstance(source, Gguf) and source.model_id == "m"
    assert {name: tensor.tolist() for name, tensor in take_all(source).items()} == {
        name: tensor.tolist() for name, tensor in whole.items()
    }
    (tmp_path / "alone.gguf").write_bytes(parts[0].read_bytes())
    with pytest.raises(CheckpointError, match="without its part's number"):
        Gguf(tmp_path / "alone.gguf")
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="incomplete") as caught:
        open_source(parts[0])
    assert caught.value.file == parts[1]


def test_names_dates_and_sampling(tmp_path: Path) -> None:
    path, oracle = written(tmp_path, "llama", "F32")
    source = Gguf(path)
    assert source.model_id == "llama" and source.created == int(path.stat().st_mtime)
    assert source.generation == {} and source.config["eos_token_id"] == [0]
    assert source.end_tokens() == [2], "the template ends turns with <|im_end|>"
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "m.gguf").write_bytes(path.read_bytes())
    assert Gguf(snapshot / "m.gguf").model_id == "org/some-model"
    del oracle


def test_templates_by_name(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "llama", "F32")
    container = read_container(path)
    own = container.metadata["tokenizer.chat_template"]
    assert chat_templates(container) == Gguf(path).templates == {"default": own}
    container.metadata["tokenizer.chat_template.tool_use"] = "T"
    assert chat_templates(container) == {"default": own, "tool_use": "T"}
    del container.metadata["tokenizer.chat_template"]
    assert chat_templates(container) == {"default": "T", "tool_use": "T"}


def test_recommended_sampling(tmp_path: Path) -> None:
    oracle = make_oracle("llama", rope_parameters=ROPE, num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", oracle, "llama", quant="F32")
    container = read_container(path)
    container.metadata["general.sampling.temp"] = 0.5
    container.metadata["general.sampling.top_k"] = 20
    assert sampling_of(container) == {"temperature": 0.5, "top_k": 20, "do_sample": True}


@pytest.mark.slow
def test_types_that_nobody_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = written(tmp_path, "llama", "Q8_0")
    monkeypatch.setattr("worker.formats.gguf.unpacker", lambda name: None)
    with pytest.raises(CheckpointError, match="stored as Q8_0"):
        load_model(Gguf(path), CPU, torch.float32, quiet)
