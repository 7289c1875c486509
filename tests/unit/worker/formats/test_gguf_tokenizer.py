"""Texts become the same tokens as llama.cpp makes of them (recorded in tests/data), for each way of cutting text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.unit.worker.formats.smollm2 import smollm2
from tests.unit.worker.formats.tiny_gguf import add_byte_tokens, add_setting, close
from worker.formats.errors import CheckpointError
from worker.formats.gguf_container import Container, read_container
from worker.formats.gguf_tokenizer import chat_templates, make_tokenizer, special_ids
from worker.formats.sentencepiece_model import read_model

DATA = Path(__file__).resolve().parents[3] / "data"
BPE = json.loads((DATA / "llamacpp_tokens.json").read_text())
SPM = json.loads((DATA / "small_spm" / "tokens.json").read_text())


@cache
def smollm2_container() -> Container:
    return read_container(smollm2())


def tokenizer(container: Container) -> Tokenizer:
    return Tokenizer.from_str(make_tokenizer(container).decode())


@pytest.mark.slow
@pytest.mark.parametrize("pre", sorted(BPE["ids"]))
def test_byte_level_tokens_are_those_of_llama_cpp(pre: str) -> None:
    container = smollm2_container()
    metadata = container.metadata | {"tokenizer.ggml.pre": pre}
    reader = tokenizer(Container(container.path, metadata, container.tensors))
    for text, expected in zip(BPE["texts"], BPE["ids"][pre], strict=True):
        found = reader.encode(text, add_special_tokens=False).ids
        if pre in ("qwen2", "qwen35") and "\u0301" in text:
            # Qwen's own tokenizer composes accents first, which llama.cpp leaves out.
            assert reader.decode(found) == "é vs é"
            continue
        assert found == expected, (text, reader.encode(text).tokens)
        assert reader.decode(found, skip_special_tokens=False) == text


def spm(path: Path, **settings: Any) -> Container:
    """The small SentencePiece model as a GGUF file."""
    model = read_model(DATA / "small_spm" / "tokenizer.model")
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "model": "llama",
        "tokens": model.pieces,
        "token_type": model.kinds,
        "scores": model.scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **settings,
    }.items():
        add_setting(writer, f"tokenizer.ggml.{name}", value)
    writer.add_tensor("w", np.zeros(1, np.float32))
    return read_container(close(writer, path))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_llama_cpp(tmp_path: Path, prefix: bool) -> None:
    reader = tokenizer(spm(tmp_path / "m.gguf", add_space_prefix=prefix))
    for text, expected in zip(SPM["texts"], SPM[f"space_prefix_{str(prefix).lower()}"], strict=True):
        found = reader.encode(text)
        assert found.ids == expected, (text, found.tokens)
        if "<|" not in text and "    " not in text:
            assert reader.decode(found.ids) == text


def test_a_beginning_is_added_only_where_the_file_asks(tmp_path: Path) -> None:
    asked = tokenizer(spm(tmp_path / "a.gguf", add_bos_token=True)).encode("hi").ids
    assert asked[0] == 1
    assert tokenizer(spm(tmp_path / "b.gguf", add_bos_token=False)).encode("hi").ids == asked[1:]
    assert tokenizer(spm(tmp_path / "c.gguf")).encode("hi").ids == asked, "files of this kind always did"
    assert tokenizer(spm(tmp_path / "d.gguf", bos_token_id=999999)).encode("hi").ids == asked[1:]


Change = Callable[[gguf.GGUFWriter], None]


def byte_file(path: Path, **settings: Any) -> Container:
    writer = gguf.GGUFWriter(path, "qwen2")
    add_byte_tokens(writer, 300, "gpt-2")
    for name, value in settings.items():
        writer.kv_data[0].pop(f"tokenizer.{name}", None)
        if value is not None:
            add_setting(writer, f"tokenizer.{name}", value)
    writer.add_tensor("w", np.zeros(1, np.float32))
    return read_container(close(writer, path))


def test_marks_are_found_whole_and_only_control_ones_are_special(tmp_path: Path) -> None:
    reader = tokenizer(byte_file(tmp_path / "m.gguf"))
    ids = reader.encode("the<think> the<|im_end|>").ids
    assert [reader.id_to_token(i) for i in ids] == ["the", "<think>", "Ġthe", "<|im_end|>"]
    assert reader.decode(ids) == "the<think> the"


def test_no_pre_tokenizer_is_said(tmp_path: Path) -> None:
    """Early files of Qwen2 do not say; there is only one that they can have."""
    container = byte_file(tmp_path / "m.gguf", **{"ggml.pre": None})
    steps = json.loads(make_tokenizer(container))["pre_tokenizer"]["pretokenizers"]
    assert r"\p{N}|" in steps[0]["pattern"]["Regex"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ggml.pre": "klingon-9"}, "'klingon-9', which is not known here"),
        ({"ggml.model": "t5"}, "of kind 't5'"),
        ({"ggml.merges": None}, "no 'tokenizer.ggml.merges'"),
        ({"ggml.merges": ["ab"]}, "is not two pieces"),
        ({"ggml.merges": ["th qqq"]}, "cannot be used"),
        ({"ggml.tokens": None}, "the file has no tokenizer"),
        ({"ggml.tokens": ["a", "a"], "ggml.token_type": None}, "'a' is in its vocabulary twice"),
        ({"ggml.tokens": ["a", "b"]}, "300 elements for 2 tokens"),
        ({"ggml.token_type": "x"}, "not a list of numbers"),
        ({"huggingface.json": "{}"}, "cannot be used"),
    ],
)
def test_tokenizers_that_cannot_be_used(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    container = byte_file(tmp_path / "m.gguf", **settings)
    with pytest.raises(CheckpointError, match=said) as caught:
        make_tokenizer(container)
    assert caught.value.file == tmp_path / "m.gguf"


def test_a_whole_tokenizer_in_the_file_is_taken(tmp_path: Path) -> None:
    made = make_tokenizer(byte_file(tmp_path / "a.gguf")).decode()
    container = byte_file(tmp_path / "b.gguf", **{"huggingface.json": made, "ggml.model": "whatever"})
    assert make_tokenizer(container).decode() == made


def test_templates_and_marks(tmp_path: Path) -> None:
    container = byte_file(tmp_path / "a.gguf", **{"ggml.eot_token_id": 2, "ggml.eom_token_id": 900})
    assert special_ids(container) == {"bos_token_id": [1], "eos_token_id": [0, 2]}
    assert chat_templates(container)["default"].endswith("<|im_end|>")
    named = {"chat_template": None, "chat_template.tool_use": "T", "chat_template.default": "D"}
    templates = chat_templates(byte_file(tmp_path / "b.gguf", **named))
    assert templates == {"tool_use": "T", "default": "D"}
    assert chat_templates(byte_file(tmp_path / "c.gguf", chat_template=None)) == {}
