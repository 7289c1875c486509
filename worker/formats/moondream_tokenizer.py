"""Owns telling Moondream's tokenizer from the stale one that released folders of Moondream 2 carry. Any thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker.formats.errors import CheckpointError

_ARCHITECTURES = ("HfMoondream", "moondream1")
_RELEASED_VOCABULARY = 51200
_RESERVED = {1: "<|md_reserved_0|>", 2: "<|md_reserved_1|>", 3: "<|md_reserved_2|>"}
_QUERY_ID = 15381


def is_moondream(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a Moondream, which has prompts of its own in place of a template."""
    named = config.get("architectures")
    names = [*named, config.get("model_type")] if isinstance(named, list) else [config.get("model_type")]
    return any(name in _ARCHITECTURES for name in names)


def refuse_stale(tokenizer: bytes, config: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError where a released Moondream 2 has the tokenizer.json of GPT-2 beside it.

    The release loads another one by code, so its own file was never used: answers from it read well and are wrong.
    """
    sections = config.get("config")
    text = sections.get("text") if isinstance(sections, dict) else None
    size = text.get("vocab_size", _RELEASED_VOCABULARY) if isinstance(text, dict) else _RELEASED_VOCABULARY
    if size != _RELEASED_VOCABULARY:
        return  # a model of the family with another vocabulary
    from tokenizers import Tokenizer

    reader = Tokenizer.from_str(tokenizer.decode())
    found = reader.encode("query", add_special_tokens=False).ids
    reserved = {index: reader.id_to_token(index) for index in _RESERVED}
    if found != [_QUERY_ID] or reserved != _RESERVED:
        raise CheckpointError(
            f"the stale GPT-2 tokenizer ('query' is {found}, expected [{_QUERY_ID}]); Moondream 2 speaks that of "
            "moondream/starmie-v1: put its tokenizer.json in place of this one",
            file=folder / "tokenizer.json",
        )
