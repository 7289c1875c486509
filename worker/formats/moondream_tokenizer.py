"""Owns telling a folder of Moondream's, and its tokenizer from the stale one of Moondream 2's; finding the right one. Any thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker.formats.errors import CheckpointError
from worker.formats.folder_tokenizer import find_tokenizer
from worker.formats.safetensors_header import stored_names
from worker.formats.tokenizer_json import check_tokenizer

_ARCHITECTURES = ("HfMoondream", "moondream1", "moondream3", "Moondream3ForCausalLM")
_EMBEDDINGS = ("model.text.wte", "text_model.transformer.embd.wte.weight")
_RELEASED_VOCABULARY = 51200
RESERVED = {1: "<|md_reserved_0|>", 2: "<|md_reserved_1|>", 3: "<|md_reserved_2|>"}
QUERY_ID = 15381
_FOLDER = "starmie-v1"


def is_moondream(config: dict[str, Any], folder: Path) -> bool:
    """Whether a folder is a Moondream's, which has prompts of its own in place of a template: by what config.json names it, or
    where that names nothing, as 3.1's may, by its tensors' names."""
    named = config.get("architectures")
    names = [*(named if isinstance(named, list) else []), config.get("model_type")]
    if any(name is not None for name in names):
        return any(name in _ARCHITECTURES for name in names)
    file = folder / "model.safetensors"
    return file.is_file() and any(name in stored_names(file) for name in _EMBEDDINGS)


def moondream_tokenizer(config: dict[str, Any], folder: Path) -> bytes:
    """The tokenizer.json that a Moondream in this folder speaks: its own, or where there is none or that is GPT-2's, the one of
    a starmie-v1 folder in it, beside it, or beside it in a Hugging Face cache. Raises CheckpointError where there is none.

    The release loads another one by code, so its own file was never used: answers from it read well and are wrong.
    """
    sections = config.get("config", config)
    text = sections.get("text") if isinstance(sections, dict) else None
    size = text.get("vocab_size", _RELEASED_VOCABULARY) if isinstance(text, dict) else _RELEASED_VOCABULARY
    is_there = (folder / "tokenizer.json").is_file()
    if is_there or size != _RELEASED_VOCABULARY:
        tokenizer = find_tokenizer(folder, config)
        if size != _RELEASED_VOCABULARY:
            return tokenizer  # a model of the family with another vocabulary
        fault = f"the stale GPT-2 tokenizer ({found})" if (found := _fault_of(tokenizer)) else ""
        if not fault:
            return tokenizer
    else:
        fault = "not in this folder"
    for file in _elsewhere(folder):
        other = file.read_bytes()
        check_tokenizer(other, file)
        wrong = _fault_of(other)
        if wrong:
            raise CheckpointError(f"not the tokenizer of moondream/starmie-v1 ({wrong})", file=file)
        return other
    raise CheckpointError(
        f"{fault}; Moondream speaks that of moondream/starmie-v1: put its tokenizer.json here, or as "
        f"{_FOLDER}/tokenizer.json into this folder or beside it",
        file=folder / "tokenizer.json",
    )


def _fault_of(tokenizer: bytes) -> str:
    from tokenizers import Tokenizer

    reader = Tokenizer.from_str(tokenizer.decode())
    found = reader.encode("query", add_special_tokens=False).ids
    if found != [QUERY_ID]:
        return f"'query' is {found}, expected [{QUERY_ID}]"
    named = ((index, reader.id_to_token(index), mark) for index, mark in RESERVED.items())
    return next(
        (f"id {index} is {found!r}, expected {mark!r}" for index, found, mark in named if found != mark), ""
    )


def _elsewhere(folder: Path) -> list[Path]:
    """Files that may be the right one, the nearest first."""
    absolute = folder.absolute()
    near = [absolute / _FOLDER, absolute.parent / _FOLDER]
    if absolute.parent.name == "snapshots" and len(absolute.parents) > 2:
        cached = absolute.parents[2] / "models--moondream--starmie-v1" / "snapshots"
        near += sorted(cached.glob("*"))
    return [file for at in near if (file := at / "tokenizer.json").is_file()]
