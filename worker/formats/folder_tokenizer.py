"""Owns a folder's tokenizer: tokenizer.json, or one made of tokenizer.model or of vocab.json and merges.txt. Any thread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from worker.formats.errors import CheckpointError
from worker.formats.json_files import read_object
from worker.formats.lfs import refuse_pointer
from worker.formats.pre_tokenizers import PRE_TOKENIZERS
from worker.formats.sentencepiece_model import read_model, tokenizer_of_model
from worker.formats.tokenizer_json import AddedToken, byte_level_bpe, check_tokenizer, write_tokenizer

_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Classes whose vocab.json and merges.txt are byte-level merges, and how they cut text.
_CUTS = {
    "GPT2Tokenizer": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "CodeGenTokenizer": "gpt-2",
    "Starcoder2Tokenizer": "starcoder",
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_TO_DO = (
    "load it once with transformers and save it: "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json"
)


def find_tokenizer(folder: Path, config: dict[str, Any]) -> bytes:
    """The folder's tokenizer.json, read or made, which the tokenizers library reads. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"not readable: {error.strerror or error}", file=path) from error
        refuse_pointer(path)
        check_tokenizer(text, path)
        return text
    for name in _MODELS:
        if (folder / name).is_file():
            return _of_model(folder, folder / name)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _of_merges(folder)
    raise CheckpointError(
        "no tokenizer.json, no tokenizer.model and no vocab.json with merges.txt, of which the gateway needs one to "
        "speak text: the download is incomplete",
        file=folder,
    )


def refuse_larger(tokenizer: bytes, vocab_size: Any, folder: Path) -> None:
    """Raise CheckpointError if the tokenizer has more tokens than the model. Added ones do not count: some models are
    released with marks that only their relatives know."""
    model = json.loads(tokenizer).get("model") or {}
    num_tokens = len(model.get("vocab") or ())
    if isinstance(vocab_size, int) and num_tokens > vocab_size:
        raise CheckpointError(
            f"a tokenizer of {num_tokens} tokens, and config.json's 'vocab_size' is {vocab_size}: they belong to different "
            "models; take both from one",
            file=folder,
        )


def end_token(folder: Path) -> str:
    """The text of the tokenizer's end mark; empty where no file names one."""
    return _named(folder, "eos_token")


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that the folder's files name, as its chat template knows them."""
    found = {name: _named(folder, name) for name in _SPECIAL}
    return {name: text for name, text in found.items() if text}


def marks_of(folder: Path) -> dict[str, int]:
    """Ids of a folder's added tokens by their text."""
    tokenizer = read_object(folder / "tokenizer.json")
    listed = tokenizer.get("added_tokens")
    found = {
        entry["content"]: entry["id"]
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("id"), int)
        and isinstance(entry.get("content"), str)
    }
    if tokenizer:
        return found
    return found | {token.content: token.id for token in _added(folder)} | _model_marks(folder)


def _model_marks(folder: Path) -> dict[str, int]:
    for name in _MODELS:
        if (folder / name).is_file():
            return read_model(folder / name).marks()
    return {}


def _of_model(folder: Path, path: Path) -> bytes:
    refuse_pointer(path)
    settings = read_object(folder / "tokenizer_config.json")
    adds_bos = settings.get("add_bos_token")
    if adds_bos is None:
        adds_bos = str(settings.get("tokenizer_class", "LlamaTokenizer")).startswith(("Llama", "Gemma"))
    made = tokenizer_of_model(
        read_model(path),
        _added(folder),
        bos=_named(folder, "bos_token") if adds_bos else "",
        # `legacy: false`: the space is put in front of a text only; otherwise also behind every special token.
        prefix_once=settings.get("legacy") is False,
    )
    return write_tokenizer(made, path)


def _of_merges(folder: Path) -> bytes:
    settings = read_object(folder / "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    if kind not in _CUTS:
        raise CheckpointError(
            f"vocab.json and merges.txt without tokenizer.json, of class {kind or '(none named)'!r}: how it cuts text "
            f"is not in these files; {_TO_DO}",
            file=folder,
        )
    vocab = read_object(folder / "vocab.json")
    if not all(isinstance(index, int) for index in vocab.values()):
        raise CheckpointError("not a list of tokens and their ids", file=folder / "vocab.json")
    path = folder / "merges.txt"
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as text: {error}", file=path) from error
    merges = []
    for number, line in enumerate(lines):
        if not line.strip() or (number == 0 and line.startswith("#version")):
            continue
        left, gap, right = line.rstrip("\r").partition(" ")
        if not gap or " " in right:
            raise CheckpointError(f"line {number + 1} is not two pieces: {line[:40]!r}", file=path)
        merges.append((left, right))
    added = _added(folder)
    bos = _named(folder, "bos_token") if settings.get("add_bos_token") else ""
    mark = next((token for token in added if token.content == bos), None)
    made = byte_level_bpe(vocab, merges, added, PRE_TOKENIZERS[_CUTS[kind]], bos=mark)
    return write_tokenizer(made, path)


def _added(folder: Path) -> list[AddedToken]:
    """Added tokens of the older files: added_tokens.json, with tokenizer_config.json's settings for each."""
    special = {
        _content(value)
        for name, value in read_object(folder / "special_tokens_map.json").items()
        if isinstance(value, str | dict)
    }
    found = {
        index: AddedToken(index, text, special=text in special or text.startswith("<|"))
        for text, index in read_object(folder / "added_tokens.json").items()
        if isinstance(index, int)
    }
    described = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for index, entry in (described if isinstance(described, dict) else {}).items():
        if index.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            flags = {
                name: bool(entry.get(name))
                for name in ("special", "rstrip", "lstrip", "single_word", "normalized")
            }
            found[int(index)] = AddedToken(int(index), entry["content"], **flags)
    return list(found.values())


def _named(folder: Path, name: str) -> str:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        text = _content(read_object(folder / file).get(name))
        if text:
            return text
    return ""


def _content(value: Any) -> str:
    """A token as the older files write it: its text, or an object with its text."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
