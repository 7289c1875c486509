"""Folders as people have them: template and tokenizer from wherever they lie, ends of answers, and plain refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from shared.protocol import MAX_TEMPLATE_CHARS
from tests.unit.worker.formats.tiny_gguf import printable_bytes
from tests.unit.worker.models.dense_oracle import check_prefill, write
from tests.unit.worker.models.dense_oracle import load as load_dense
from worker.formats.chat_templates import choose_templates, warn_missing
from worker.formats.errors import CheckpointError
from worker.formats.folder import Folder
from worker.formats.open_source import open_source
from worker.formats.pre_tokenizers import PRE_TOKENIZERS
from worker.formats.tokenizer_json import AddedToken, byte_level_bpe
from worker.models.card import make_card
from worker.models.families import llama
from worker.models.settings import Settings

DATA = Path(__file__).resolve().parents[3] / "data"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def vocabulary() -> dict[str, int]:
    tokens = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>", *map(chr, printable_bytes()), "th", "the"]
    return {token: index for index, token in enumerate(tokens)}


def tokenizer_json() -> dict[str, Any]:
    marks = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>"]
    added = [AddedToken(index, mark, special=True) for index, mark in enumerate(marks)]
    return byte_level_bpe(vocabulary(), [("t", "h"), ("th", "e")], added, PRE_TOKENIZERS["gpt-2"])


def folder(path: Path, files: dict[str, Any] | None = None, *, tokenizer: bool = True, **config: Any) -> Path:
    """A folder without weights: texts as they are, all else as JSON."""
    path.mkdir(parents=True, exist_ok=True)
    every: dict[str, Any] = {"config.json": CONFIG | config, **(files or {})}
    if tokenizer:
        every.setdefault("tokenizer.json", tokenizer_json())
    for name, content in every.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(path: Path) -> CheckpointError:
    """What stops this folder, in the order in which a start asks for things."""
    with pytest.raises(CheckpointError) as caught:
        source = open_source(path)
        source.tokenizer(), choose_templates(source.templates, None, path)
        source.open(lambda *told: None)
    return caught.value


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "J", "tokenizer_config.json": {"chat_template": "C"}}, "J"),
        ({"tokenizer_config.json": {"chat_template": "C"}}, "C"),
        ({"chat_template.json": {"chat_template": "P"}}, "P"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "T"},
                        {"name": "default", "template": "D"},
                    ]
                }
            },
            "D",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "T"}]}}, "T"),
        ({"tokenizer_config.json": {"chat_template": {"rag": "R", "mine": "M"}}}, "M"),
        ({"additional_chat_templates/only.jinja": "A"}, "A"),
        ({"additional_chat_templates/tool_use.jinja": "T", "chat_template.jinja": "J"}, "J"),
        ({"chat_template.jinja": "{% generation %}x{% endgeneration %}{% break %}"}, None),
        ({}, ""),
    ],
)
def test_a_template_from_wherever_it_lies(
    tmp_path: Path, files: dict[str, Any], expected: str | None
) -> None:
    if expected is None:
        files = {
            "chat_template.jinja": "{% for m in x %}{%- generation %}{% break %}{% endgeneration -%}{% endfor %}"
        }
        expected = files["chat_template.jinja"]
    templates = Folder(folder(tmp_path, files)).templates
    assert templates.get("default", "") == expected
    assert choose_templates(templates, None, tmp_path) == templates


def named_templates(path: Path) -> Path:
    """A folder with three templates in its tokenizer_config.json and one in a file beside it."""
    listed = [{"name": name, "template": name[0]} for name in ("tool_use", "default", "rag")]
    files = {
        "tokenizer_config.json": {"chat_template": listed},
        "additional_chat_templates/brief.jinja": "b",
    }
    return folder(path, files)


def test_named_templates_are_all_found(tmp_path: Path) -> None:
    source = Folder(named_templates(tmp_path))
    assert source.templates == {"tool_use": "t", "default": "d", "rag": "r", "brief": "b"}
    card = make_card(llama.read(Settings(source.config, source.settings_file)), source, "llama")
    assert card.capabilities == ["chat", "completions"]
    assert card.chat_templates == {"tool_use": "t", "rag": "r", "brief": "b"}


def test_another_template_by_its_name_or_file(tmp_path: Path) -> None:
    templates = Folder(named_templates(tmp_path)).templates
    assert choose_templates(templates, "rag", tmp_path) == templates | {"default": "r"}
    own = tmp_path / "own.jinja"
    own.write_text("own")
    assert choose_templates(templates, str(own), tmp_path) == choose_templates({}, str(own), tmp_path)
    assert choose_templates({}, str(own), tmp_path) == {"default": "own"}
    with pytest.raises(CheckpointError, match=r"^owl: .*own templates are tool_use, default, rag, brief"):
        choose_templates(templates, "owl", tmp_path)
    own.write_text("{% for %}")
    with pytest.raises(CheckpointError, match=r"own\.jinja: .*line 1.*--chat-template FILE"):
        choose_templates(templates, str(own), tmp_path)
    own.write_text("x" * (MAX_TEMPLATE_CHARS + 1))
    with pytest.raises(CheckpointError, match="262145 characters; at most 262144"):
        choose_templates(templates, str(own), tmp_path)


def test_without_a_template_a_model_does_not_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Folder(folder(tmp_path))
    card = make_card(llama.read(Settings(source.config, source.settings_file)), source, "llama")
    assert card.capabilities == ["completions"] and card.chat_templates == {}
    warn_missing(tmp_path)
    said = capsys.readouterr().out
    assert "no_chat_template" in said and "--chat-template FILE" in said


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"chat_template.jinja": "{% for %}"}, "line 1"),
        ({"chat_template.jinja": "{{ x | nosuch }}"}, "nosuch"),
        ({"chat_template.jinja": "{% do x %}"}, "unknown tag 'do'"),
        ({"tokenizer_config.json": {"chat_template": {"default": "D", "rag": "{%"}}}, "--chat-template FILE"),
        ({"tokenizer_config.json": {"chat_template": 7}}, "neither a text nor a list"),
        ({"tokenizer_config.json": "{"}, "not readable as JSON"),
        ({"tokenizer_config.json": "[]"}, "not a JSON object"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    assert said in str(refusal(folder(tmp_path, files)))


def test_ends_of_an_answer_from_every_place(tmp_path: Path) -> None:
    files = {
        "tokenizer_config.json": {"eos_token": {"content": "</s>"}, "chat_template": "{{ m }}<|im_end|>"},
        "generation_config.json": {"eos_token_id": [3]},
    }
    source = Folder(folder(tmp_path, files, vocab_size=len(vocabulary())))
    assert source.end_tokens() == [1, 2]
    sizes = llama.read(Settings(source.config, source.settings_file))
    assert make_card(sizes, source, "llama").eos_ids == [3, 1, 2]
    assert Folder(folder(tmp_path / "bare")).end_tokens() == []
    other = folder(tmp_path / "map", {"special_tokens_map.json": {"eos_token": "<|eot_id|>"}})
    assert Folder(other).end_tokens() == [3]


def test_sentencepiece_model_alone(tmp_path: Path) -> None:
    """A folder of the older kind: `tokenizer.model`, and what is added in other files."""
    path = folder(
        tmp_path,
        {
            "tokenizer_config.json": {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "added_tokens_decoder": {"700": {"content": "<|tool|>", "special": True}},
            },
            "added_tokens.json": {"<extra>": 701},
        },
        tokenizer=False,
        vocab_size=702,
    )
    shutil.copy(DATA / "small_spm" / "tokenizer.model", path)
    source = Folder(path)
    reader = Tokenizer.from_str(source.tokenizer().decode())
    expected = json.loads((DATA / "small_spm" / "tokens.json").read_text())
    for text, ids in zip(expected["texts"], expected["space_prefix_true"], strict=True):
        assert reader.encode(text).ids == ids, text
    assert reader.encode("a<|tool|><extra>").ids[-2:] == [700, 701]
    assert source.end_tokens() == [2]
    once = {"tokenizer_config.json": {"legacy": False, "add_bos_token": False}}
    once_folder = folder(path, once, tokenizer=False, vocab_size=702)
    reader = Tokenizer.from_str(Folder(once_folder).tokenizer().decode())
    assert reader.encode("a<|im_end|>a").tokens == ["▁a", "<|im_end|>", "a"]


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    files = {
        "vocab.json": vocabulary(),
        "merges.txt": "#version: 0.2\nt h\nth e\n",
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2TokenizerFast",
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": True}},
        },
    }
    source = Folder(folder(tmp_path, files, tokenizer=False))
    reader = Tokenizer.from_str(source.tokenizer().decode())
    assert reader.encode("the<|im_end|>").tokens == ["the", "<|im_end|>"]
    assert source.end_tokens() == [2]
    for change, said in (
        ({"tokenizer_config.json": {"tokenizer_class": "OddTokenizer"}}, "of class 'OddTokenizer'"),
        ({"merges.txt": "t h e"}, "line 1 is not two pieces"),
        ({"vocab.json": {"a": "b"}}, "not a list of tokens and their ids"),
        ({"vocab.json": {"a": 0}}, "cannot be used"),
    ):
        error = refusal(folder(tmp_path / said[:6], files | change, tokenizer=False))
        assert said in str(error)


@pytest.mark.parametrize(
    ("files", "said", "file"),
    [
        ({}, "no tokenizer.json, no tokenizer.model", ""),
        ({"tokenizer.json": LFS}, "git lfs pull", "tokenizer.json"),
        ({"tokenizer.json": "{}"}, "the tokenizer cannot be used", "tokenizer.json"),
        ({"tokenizer.model": LFS}, "git lfs pull", "tokenizer.model"),
        ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "a tiktoken vocabulary", "tokenizer.model"),
        ({"tokenizer.model": "\x0a\x7fabc"}, "not a SentencePiece model", "tokenizer.model"),
        ({"tokenizer.model": ""}, "without pieces", "tokenizer.model"),
    ],
)
def test_tokenizers_that_cannot_be_used(tmp_path: Path, files: dict[str, Any], said: str, file: str) -> None:
    error = refusal(folder(tmp_path, files, tokenizer=False))
    assert said in str(error) and error.file == (tmp_path / file if file else tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": {"base_model_name_or_path": "org/base"}}, "a LoRA adapter"),
        ({"consolidated.safetensors": "", "params.json": {}}, "its makers' own layout"),
        ({"pytorch_model.bin": ""}, "only pickled weights here"),
        ({"original/consolidated.00.pth": ""}, "only original/*.pth here"),
        ({"onnx/model.onnx": ""}, "only ONNX weights here"),
        ({"weights.npz": ""}, "an MLX folder"),
        ({"model_index.json": {}}, "a diffusers pipeline"),
        ({"tf_model.h5": ""}, "only Flax or TensorFlow weights here"),
        ({"model.safetensors": LFS}, "git lfs pull"),
        ({"model-00001-of-00002.safetensors": "x"}, "the download is incomplete"),
        ({"tokenizer_config.json": {}}, "the download is incomplete"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_folders_of_something_else(
    tmp_path: Path, files: dict[str, Any], said: str, has_config: bool
) -> None:
    path = folder(tmp_path, files)
    if not has_config:
        (path / "config.json").unlink()
    assert said in str(refusal(path))


def test_a_folder_around_the_folder(tmp_path: Path) -> None:
    folder(tmp_path / "inner")
    assert "there is one in inner" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "says GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "says AWQ"),
        ({"quantization_config": {"quant_method": "fp8"}}, "says FP8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "novel"}}, "'novel'"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        (
            {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64}},
            "an MLX folder ('quantization', 4 bits)",
        ),
    ],
)
def test_quantised_weights_by_their_name(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    error = refusal(folder(tmp_path, **config))
    assert said in str(error) and "GGUF" in str(error) and error.file == tmp_path / "config.json"


def test_the_older_note_of_quantised_weights(tmp_path: Path) -> None:
    assert "4 bits" in str(refusal(folder(tmp_path, {"quantize_config.json": {"bits": 4}})))


@pytest.mark.slow
def test_weights_without_the_models_prefix(tmp_path: Path) -> None:
    oracle = write(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert "embed_tokens.weight" in bare
    save_file(bare, tmp_path / "model.safetensors")
    check_prefill(load_dense(tmp_path), oracle)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path)
    save_file({"a": torch.zeros(1)}, path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    error = refusal(path)
    assert error.file == path / "model-00002-of-00002.safetensors" and "incomplete" in str(error)


def starmie(folder: Path, *, stale: bool) -> Path:
    vocab = vocabulary()
    if not stale:
        reserved = {f"<|md_reserved_{index}|>": index + 1 for index in range(3)}
        vocab = {"<|endoftext|>": 0, **reserved}
        vocab |= {chr(c): 100 + i for i, c in enumerate(printable_bytes())}
        vocab |= {"qu": 500, "er": 501, "quer": 502, "query": 15381}
    merges = [] if stale else [("q", "u"), ("e", "r"), ("qu", "er"), ("quer", "y")]
    made = byte_level_bpe(vocab, merges, [], PRE_TOKENIZERS["gpt-2"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["HfMoondream"], "config": {}}))
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


def test_the_stale_tokenizer_of_moondream_2(tmp_path: Path) -> None:
    error = refusal(starmie(tmp_path / "stale", stale=True))
    assert "moondream/starmie-v1" in str(error) and error.file == tmp_path / "stale" / "tokenizer.json"
    right = Folder(starmie(tmp_path / "right", stale=False)).tokenizer()
    wrong = json.loads(right)
    wrong["model"]["vocab"]["<|md_reserved_1|>"] = 99
    (tmp_path / "right" / "tokenizer.json").write_text(json.dumps(wrong))
    assert "expected '<|md_reserved_1|>'" in str(refusal(tmp_path / "right"))


def test_a_moondream_without_a_tokenizer(tmp_path: Path) -> None:
    """3.1 is two files: its config.json, which may name nothing, and its weights."""
    home = tmp_path / "third"
    home.mkdir()
    (home / "config.json").write_text("{}")
    save_file({"text_model.transformer.embd.wte.weight": torch.zeros(1, 1)}, home / "model.safetensors")
    error = refusal(home)
    assert "not in this folder; Moondream speaks that of moondream/starmie-v1" in str(error)
    right = starmie(tmp_path / "starmie-v1", stale=False) / "tokenizer.json"
    assert Folder(home).tokenizer() == right.read_bytes()


@pytest.mark.parametrize("place", ["stale/starmie-v1", "starmie-v1", "hub"])
def test_the_right_tokenizer_is_taken_from_a_second_folder(tmp_path: Path, place: str) -> None:
    home = tmp_path / "stale"
    if place == "hub":
        home = tmp_path / "models--vikhyatk--moondream2" / "snapshots" / "0a1b"
        place = "models--moondream--starmie-v1/snapshots/2c3d"
    right = starmie(tmp_path / "made", stale=False) / "tokenizer.json"
    second = tmp_path / place / "tokenizer.json"
    source = Folder(starmie(home, stale=True))
    second.parent.mkdir(parents=True)
    second.write_bytes(right.read_bytes())
    assert source.tokenizer() == right.read_bytes()
    second.write_bytes((home / "tokenizer.json").read_bytes())
    error = refusal(home)
    assert "not the tokenizer of moondream/starmie-v1" in str(error) and error.file == second
