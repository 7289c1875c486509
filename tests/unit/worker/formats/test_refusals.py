"""Every refusal that docs/formats.md lists, from a folder or file broken so: what is named, and what to do about it."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.worker.formats.test_folder import LFS, starmie, tokenizer_json
from tests.unit.worker.formats.test_folder import folder as write_files
from tests.unit.worker.formats.test_gguf import ROPE
from tests.unit.worker.formats.tiny_gguf import close, make_oracle, write_gguf
from tests.unit.worker.models.paged_driver import quiet
from worker.formats.chat_templates import choose_templates
from worker.formats.errors import CheckpointError
from worker.formats.locate import locate
from worker.formats.open_source import open_source
from worker.models.registry import load_model

DOCS = Path(__file__).resolve().parents[4] / "docs" / "formats.md"


def start(path: Path) -> None:
    """What a worker does with a model, in its order."""
    source = open_source(locate(str(path)))
    source.tokenizer()
    choose_templates(source.templates, None, source.path)
    with torch.inference_mode():
        load_model(source, torch.device("cpu"), torch.float32, quiet)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a folder in two shards, `folder`, and as a file, `m.gguf`: both are served."""
    from transformers import LlamaConfig, LlamaForCausalLM

    home = tmp_path_factory.mktemp("whole")
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home / "folder", max_shard_size="30KB")
    (home / "folder" / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    write_gguf(
        home / "m.gguf",
        make_oracle("llama", rope_parameters=ROPE, num_hidden_layers=1),
        "llama",
        quant="Q8_0",
    )
    start(home / "folder")
    start(home / "m.gguf")
    return home


class Case(NamedTuple):
    """One broken model. `row` is the first cell of its line in the documents; `file` is what the error names of it, with
    `words`; `broken` breaks a copy of `whole` and returns what is then served."""

    row: str
    file: str
    words: str
    broken: Callable[[Path], Path]


def files(contents: dict[str, Any], **config: Any) -> Callable[[Path], Path]:
    """A folder of config.json, a tokenizer unless it is among the contents, and these."""

    def broken(home: Path) -> Path:
        given = {"tokenizer.json": tokenizer_json()} | contents
        kept = {name: content for name, content in given.items() if content is not None}
        return write_files(home / "other", kept, tokenizer=False, **config)

    return broken


def config(**changes: Any) -> Callable[[Path], Path]:
    """The folder with other settings; None takes one away."""

    def broken(home: Path) -> Path:
        file = home / "folder" / "config.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
        return home / "folder"

    return broken


def shard(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """The folder with its last shard changed."""

    def broken(home: Path) -> Path:
        change(home / "folder" / "model-00003-of-00003.safetensors")
        return home / "folder"

    return broken


def without(name: str) -> Callable[[Path], Path]:
    """The folder without one of its files."""

    def broken(home: Path) -> Path:
        (home / "folder" / name).unlink()
        return home / "folder"

    return broken


def gguf_file(change: Callable[[bytes], bytes], name: str = "m.gguf") -> Callable[[Path], Path]:
    """The GGUF file with other bytes, under a name."""

    def broken(home: Path) -> Path:
        file = home / "m.gguf"
        file.write_bytes(change(file.read_bytes()))
        return file.rename(home / name)

    return broken


def of_type(number: int) -> Callable[[bytes], bytes]:
    """A GGUF file whose output projection is stored as this type."""

    def change(data: bytes) -> bytes:
        name = b"blk.0.attn_output.weight"
        place = data.index(name) + len(name)
        place += 4 + 8 * struct.unpack_from("<I", data, place)[0]
        return data[:place] + struct.pack("<I", number) + data[place + 4 :]

    return change


def two_files(home: Path) -> Path:
    shutil.copy(home / "m.gguf", home / "n.gguf")
    return home


GPTQ, LORA = {"quant_method": "gptq", "bits": 4}, {"base_model_name_or_path": "org/base"}
QUANTISED = "GPTQ, AWQ, FP8, bitsandbytes, compressed-tensors …"
SETTING, SIZES = "a setting that no model has", "sizes that do not fit the weights"
LAYERS = "weights for more layers than config.json has, or fewer"
PICKLES = "only `.bin`, `.pt`, `.pth`, `original/*.pth`"
CONFIG, LAST = "config.json", "model-00003-of-00003.safetensors"

CASES = [
    Case("a shard that the index names is missing", LAST, "fetch it again", shard(Path.unlink)),
    Case("shards without their index", "folder", "3 safetensors files and no index .*incomplete", without("model.safetensors.index.json")),
    Case("a Git LFS pointer in place of a file", LAST, "`git lfs pull`", shard(lambda file: file.write_text(LFS))),
    Case("a Git LFS pointer in place of a file", "tokenizer.json", "`git lfs pull`", files({"tokenizer.json": LFS})),
    Case("a safetensors file that is cut", LAST, "model.norm.weight: bytes .*incomplete", shard(lambda file: file.write_bytes(file.read_bytes()[:-100]))),
    Case("a safetensors file that is cut", LAST, "header of .* in a file of 20: .*incomplete", shard(lambda file: file.write_bytes(file.read_bytes()[:20]))),
    Case("no `config.json`", "folder", "no config.json .*incomplete", without("config.json")),
    Case("no `config.json`", "outer", "there is one in folder: serve that", lambda home: (home / "folder").rename(home / "outer" / "folder").parent),
    Case("no tokenizer", "folder", "no tokenizer.json, no tokenizer.model and no vocab.json", without("tokenizer.json")),
    Case("a tokenizer that cannot be used", "tokenizer.json", "cannot be used: ", files({"tokenizer.json": "{}"})),
    Case("a tiktoken `tokenizer.model`", "tokenizer.model", "tokenizer.json", files({"tokenizer.json": None, "tokenizer.model": "IQ== 0\nIg== 1\n"})),
    Case("a tokenizer of another model, larger than the vocabulary", "folder", "262 tokens, and .* is 100", config(vocab_size=100)),
    Case("`tokenizer.json` of GPT-2 in a released Moondream 2, or none in a Moondream", "tokenizer.json", "moondream/starmie-v1", lambda home: starmie(home / "stale", stale=True)),
    Case("a template that cannot be used", "other", "line 1: .*--chat-template FILE", files({"chat_template.jinja": "{% for %}"})),
    Case(PICKLES, "other", "pickles can run code", files({"pytorch_model.bin": ""})),
    Case(PICKLES, "other", "pickles that can run code", files({"original/consolidated.00.pth": ""})),
    Case("only ONNX, Flax or TensorFlow", "other", "ONNX .*download model", files({"onnx/model.onnx": ""})),
    Case("only ONNX, Flax or TensorFlow", "other", "Flax or TensorFlow .*GGUF", files({"tf_model.h5": ""})),
    Case("MLX", CONFIG, "MLX .*4 bits.*GGUF", files({}, quantization={"group_size": 64, "bits": 4})),
    Case("MLX", "other", "MLX .*GGUF", files({"weights.npz": ""})),
    Case("`consolidated.safetensors`, `params.json`", "other", "Hugging Face's layout", files({"params.json": {}, "consolidated.safetensors": ""})),
    Case("`adapter_config.json`", "adapter_config.json", "LoRA .*merge it into org/base", files({"adapter_config.json": LORA})),
    *[
        Case(QUANTISED, CONFIG, f"says {called}.*GGUF", files({}, quantization_config={"quant_method": method}))
        for method, called in {"awq": "AWQ", "fp8": "FP8", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors"}.items()
    ],
    Case(QUANTISED, CONFIG, "says GPTQ.*GGUF", config(quantization_config=GPTQ)),
    Case(QUANTISED, "quant_config.json", "4 bits .*GGUF", files({"quant_config.json": {"w_bit": 4}})),
    Case("a diffusers pipeline", "other", "not a language model", files({"model_index.json": {}})),
    Case("an architecture that is not served", CONFIG, "architecture GPT2LMHeadModel, gpt2; served are Llama 2 and 3", config(architectures=["GPT2LMHeadModel"], model_type="gpt2")),
    Case("an architecture that is not served", CONFIG, "nearest family that is served is Qwen 2", config(architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe")),
    Case("`model_type` of another family than the class", CONFIG, "'qwen2', not 'llama'", config(model_type="qwen2")),
    Case("code of its own (`auto_map`)", CONFIG, "modeling_x.X.* never run", config(auto_map={"AutoModelForCausalLM": "modeling_x.X"})),
    Case(SETTING, CONFIG, "'hidden_size' is -3; a whole number from 1", config(hidden_size=-3)),
    Case(SETTING, CONFIG, "'hidden_size' is 'wide'; a whole", config(hidden_size="wide")),
    Case(SETTING, CONFIG, "'hidden_size' is missing", config(hidden_size=None)),
    Case(SETTING, CONFIG, "'num_attention_heads' does not divide", config(num_attention_heads=7)),
    Case(SETTING, CONFIG, "'rope_theta' is -1; a number above 0", config(rope_theta=-1, rope_parameters=None)),
    Case(SETTING, CONFIG, "'rms_norm_eps' is 1000000000.0; it lies", config(rms_norm_eps=1e9)),
    *[
        Case(SETTING, CONFIG, f"'{name}' is 10+; a whole number from 1 to", config(**{name: 10**18}))
        for name in ("max_position_embeddings", "num_hidden_layers", "vocab_size", "intermediate_size")
    ],
    Case(SIZES, "model-00001-of-00003.safetensors", r"embed_tokens.*expected \(290, 32\), found \(300, 32\)", config(vocab_size=290)),
    Case(LAYERS, LAST, "does not know: model.layers.1.*config.json that belongs", config(num_hidden_layers=1)),
    Case(LAYERS, "folder", "model.layers.2.*missing: .*incomplete, or config.json is another", config(num_hidden_layers=3)),
    Case("ids outside the vocabulary", CONFIG, "'eos_token_id' is 1000000; ids lie in 0 … 299", config(eos_token_id=10**6)),
    Case("an activation or kind of rotation that is not built", CONFIG, "'hidden_act' is 'xielu'; supported are silu", config(hidden_act="xielu")),
    Case("an activation or kind of rotation that is not built", CONFIG, "'mrope' is not supported, only default", config(rope_parameters={"rope_type": "mrope", "rope_theta": 1e4})),
    Case("several GGUF files in a folder", "home", "name one of them: m.gguf, n.gguf", two_files),
    Case("a vision tower (`mmproj…gguf`)", "m.gguf", "the other GGUF file", lambda home: close(gguf.GGUFWriter(home / "m.gguf", "clip"), home / "m.gguf")),
    Case("a part of a split GGUF is missing", "m-00002-of-00002.gguf", "incomplete", gguf_file(bytes, "m-00001-of-00002.gguf")),
    Case("a GGUF file that is cut", "m.gguf", "lie outside a file of .*incomplete", gguf_file(lambda data: data[: len(data) // 2])),
    Case("a GGUF file that is cut", "m.gguf", "of a file of 40: .*incomplete", gguf_file(lambda data: data[:40])),
    Case("a GGUF architecture that is not served", "m.gguf", "'mamba' is not served; served are llama, qwen2", gguf_file(lambda data: data.replace(b"llama", b"mamba"))),
    Case("a GGUF type that cannot be unpacked", "m.gguf", "blk.0.attn_output.weight: .*type 99", gguf_file(of_type(99))),
    Case("a GGUF way of cutting text that is not known", "m.gguf", "'novel', which .*known are", gguf_file(lambda data: data.replace(b"gpt-2", b"novel"))),
    Case("neither a file nor a name", "nothing", "no such file or folder", lambda home: home / "nothing"),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{number}-{case.row[:40]}" for number, case in enumerate(CASES)]
)
def test_each_refusal_names_the_file_and_what_to_do(case: Case, whole: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(whole, home)
    (home / "outer").mkdir()
    path = case.broken(home)
    with pytest.raises(CheckpointError, match=case.words) as caught:
        start(path)
    assert caught.value.file is not None and caught.value.file.name == case.file
    assert "\n" not in str(caught.value), "one sentence"


def test_the_documents_list_every_refusal_and_no_other() -> None:
    _, _, rest = DOCS.read_text().partition("## What is refused")
    rows = re.findall(r"^\| (.+?) \| .+ \|$", rest, re.MULTILINE)[1:]
    assert sorted(rows) == sorted({case.row for case in CASES})
    assert "test_refusals.py" in rest


def test_weights_without_the_prefix_are_served(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "folder", tmp_path / "folder")
    tensors: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "folder").glob("*.safetensors*"):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    save_file(
        {name.removeprefix("model."): one for name, one in tensors.items()},
        tmp_path / "folder" / "model.safetensors",
    )
    start(tmp_path / "folder")
