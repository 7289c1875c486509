"""Owns making a tokenizer.json of the vocabulary in a GGUF file, and the file's chat templates. Any thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import structlog

from worker.formats.chat_templates import DEFAULT, Templates, with_default
from worker.formats.errors import CheckpointError
from worker.formats.gguf_container import Container
from worker.formats.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from worker.formats.tokenizer_json import (
    AddedToken,
    Spaces,
    byte_level_bpe,
    check_tokenizer,
    sentencepiece_bpe,
    write_tokenizer,
)

log = structlog.get_logger()

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# Files from before spring 2024 do not name their pre-tokenizer; these architectures have only one.
_UNSAID = {"qwen2": "qwen2", "qwen3": "qwen2", "stablelm": "stablelm2"}
# Marks of Phi-3 after which its tokenizer eats spaces; its other marks do not.
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def make_tokenizer(container: Container) -> bytes:
    """The tokenizer.json of a file. Raises CheckpointError naming what is missing or not known."""
    path, metadata = container.path, container.metadata
    given = metadata.get("tokenizer.huggingface.json")
    if isinstance(given, str) and given:
        text = given.encode("utf-8", "replace")
        check_tokenizer(text, path)
        return text
    kind = metadata.get("tokenizer.ggml.model")
    vocabulary = _Vocabulary(container)
    if kind == "gpt2":
        return write_tokenizer(_byte_level(vocabulary), path)
    if kind == "llama":
        return write_tokenizer(_sentencepiece(vocabulary), path)
    raise CheckpointError(f"its tokenizer is of kind {kind!r}; 'gpt2' and 'llama' are read here", file=path)


def special_ids(container: Container) -> dict[str, list[int]]:
    """`bos_token_id` (at most one) and `eos_token_id` (ends of text, of a turn and of a message), in range."""
    num_tokens = len(_strings(container, "tokenizer.ggml.tokens"))

    def ids(*names: str) -> list[int]:
        found = (container.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
        kept = [value for value in found if isinstance(value, int) and 0 <= value < num_tokens]
        return list(dict.fromkeys(kept))

    return {"bos_token_id": ids("bos"), "eos_token_id": ids("eos", "eot", "eom")}


def token_ids(container: Container, texts: tuple[str, ...]) -> list[int]:
    """Ids of those of the texts that are control or user-defined tokens."""
    return [id for text, id in _Vocabulary(container).marks().items() if text in texts]


def chat_templates(container: Container) -> Templates:
    """The templates in the file, by name; empty where it has none."""
    key = "tokenizer.chat_template"
    found = {
        name.removeprefix(key).removeprefix(".") or DEFAULT: text.encode("utf-8", "replace").decode()
        for name, text in container.metadata.items()
        if (name == key or name.startswith(f"{key}.")) and isinstance(text, str) and text
    }
    return with_default(found)


class _Vocabulary:
    """The lists of a file's tokenizer, checked against one another."""

    def __init__(self, container: Container) -> None:
        self.path: Path = container.path
        self.metadata: dict[str, Any] = container.metadata
        self.architecture = str(self.metadata.get("general.architecture"))
        self.tokens = _strings(container, "tokenizer.ggml.tokens")
        if not self.tokens:
            raise CheckpointError("no 'tokenizer.ggml.tokens': the file has no tokenizer", file=self.path)
        # An empty token cannot be found in text; it keeps its id under a name that no text contains.
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self.tokens)]
        self.types = self._numbers("token_type", "iu", _NORMAL)
        self.scores = self._numbers("scores", "fiu", 0)
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            seen: set[str] = set()
            twice = next(token for token in self.tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
            raise CheckpointError(f"the token {twice!r} is in its vocabulary twice", file=self.path)

    def _numbers(self, name: str, kinds: str, default: int) -> list[Any]:
        found = self.metadata.get(f"tokenizer.ggml.{name}")
        if found is None:
            return [default] * len(self.tokens)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in kinds:
            raise CheckpointError(f"'tokenizer.ggml.{name}' is not a list of numbers", file=self.path)
        if len(found) != len(self.tokens):
            raise CheckpointError(
                f"'tokenizer.ggml.{name}' has {len(found)} elements for {len(self.tokens)} tokens",
                file=self.path,
            )
        values: list[Any] = found.tolist()
        return values

    def marks(self) -> dict[str, int]:
        """Control, user-defined and unknown tokens: what is found in text before anything else."""
        kinds = (_CONTROL, _USER_DEFINED, _UNKNOWN)
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in kinds
        }

    def added(self) -> list[AddedToken]:
        """The marks in tokenizer.json's form."""
        eats = self.architecture == "phi3" and self.metadata.get("tokenizer.ggml.model") == "llama"
        return [
            AddedToken(
                index,
                token,
                special=self.types[index] != _USER_DEFINED,
                rstrip=eats and token not in _PHI3_PLAIN,
            )
            for token, index in self.marks().items()
        ]

    def bos(self, default: bool) -> AddedToken | None:
        """The mark put before every text, if the file asks for it, or says nothing and files of its kind always have it."""
        index = self.metadata.get("tokenizer.ggml.bos_token_id")
        if not self.metadata.get("tokenizer.ggml.add_bos_token", default):
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            return None
        return AddedToken(index, self.tokens[index], special=True)


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    merges = vocabulary.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError("no 'tokenizer.ggml.merges': half a tokenizer", file=vocabulary.path)
    pairs = []
    for merge in merges:
        at = merge.find(" ", 1)
        if at < 0:
            raise CheckpointError(f"the merge {merge!r} is not two pieces", file=vocabulary.path)
        pairs.append((merge[:at], merge[at + 1 :]))
    cut = _cut(vocabulary)
    return byte_level_bpe(vocabulary.ids, pairs, vocabulary.added(), cut, bos=vocabulary.bos(cut.adds_bos))


def _cut(vocabulary: _Vocabulary) -> PreTokenizer:
    name = vocabulary.metadata.get("tokenizer.ggml.pre")
    if name in (None, "", "default"):
        name = _UNSAID.get(vocabulary.architecture, "gpt-2")
        log.warning("pre_tokenizer_not_said", file=str(vocabulary.path), taken=name)
    found = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(
            f"its pre-tokenizer ('tokenizer.ggml.pre') is {name!r}, which is not known here, and without it texts "
            f"would be cut wrongly; known are {', '.join(sorted(PRE_TOKENIZERS))}",
            file=vocabulary.path,
        )
    return found


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    pairs = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    unknown = vocabulary.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    known = isinstance(unknown, int) and 0 <= unknown < len(pairs) and pairs[unknown][1] == _UNKNOWN
    return sentencepiece_bpe(
        vocabulary.ids,
        vocabulary.scores,
        vocabulary.added(),
        mergeable=[token for token, kind in pairs if kind in (_NORMAL, _UNUSED)],
        unknown=pairs[unknown][0] if known else None,
        byte_fallback=any(kind == _BYTE for _, kind in pairs),
        spaces=Spaces(bool(vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", True))),
        bos=vocabulary.bos(True),
    )


def _strings(container: Container, key: str) -> list[str]:
    found = container.metadata.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise CheckpointError(f"{key!r} is not a list of strings", file=container.path)
    return found
