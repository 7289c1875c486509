"""Owns telling Moondream's tokenizer from the stale one of released Moondream 2 folders, and finding the right one. Any thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker.formats.errors import CheckpointError
from worker.formats.tokenizer_json import check_tokenizer

_ARCHITECTURES = ("HfMoondream", "moondream1")
_RELEASED_VOCABULARY = 51200
RESERVED = {1: "<|md_reserved_0|>", 2: "<|md_reserved_1|>", 3: "<|md_reserved_2|>"}
QUERY_ID = 15381
_FOLDER = "starmie-v1"


def is_moondream(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a Moondream, which has prompts of its own in place of a template."""
    named = config.get("architectures")
    names = [*named, config.get("model_type")] if isinstance(named, list) else [config.get("model_type")]
    return any(name in _ARCHITECTURES for name in names)


def right_tokenizer(tokenizer: bytes, config: dict[str, Any], folder: Path) -> bytes:
    """The tokenizer.json that a Moondream in this folder speaks: its own, or where that is GPT-2's, the one of a starmie-v1
    folder in it, beside it, or beside it in a Hugging Face cache. Raises CheckpointError where there is none.

    The release loads another one by code, so its own file was never used: answers from it read well and are wrong.
    """
    sections = config.get("config")
    text = sections.get("text") if isinstance(sections, dict) else None
    size = text.get("vocab_size", _RELEASED_VOCABULARY) if isinstance(text, dict) else _RELEASED_VOCABULARY
    if size != _RELEASED_VOCABULARY:
        return tokenizer  # a model of the family with another vocabulary
    fault = _fault_of(tokenizer)
    if not fault:
        return tokenizer
    for file in _elsewhere(folder):
        other = file.read_bytes()
        check_tokenizer(other, file)
        wrong = _fault_of(other)
        if wrong:
            raise CheckpointError(f"not the tokenizer of moondream/starmie-v1 ({wrong})", file=file)
        return other
    raise CheckpointError(
        f"the stale GPT-2 tokenizer ({fault}); Moondream 2 speaks that of moondream/starmie-v1: put its tokenizer.json in "
        f"place of this one, or as {_FOLDER}/tokenizer.json into this folder or beside it",
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
