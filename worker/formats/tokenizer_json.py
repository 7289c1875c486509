"""Owns writing a tokenizer.json from the parts that other formats hold: pieces, scores, merges, marks. Any thread."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worker.formats.errors import CheckpointError
from worker.formats.pre_tokenizers import PreTokenizer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in text before anything else. `special`: left out of answers."""

    id: int
    content: str
    special: bool
    rstrip: bool = False
    lstrip: bool = False
    normalized: bool = False
    single_word: bool = False


_NO_FIRST_SPACE: Json = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@dataclass(frozen=True, slots=True)
class Spaces:
    """What SentencePiece does to a text before it looks for pieces, where spaces are written ▁."""

    prefix: bool  # a space is put before a text and behind every special token
    prefix_once: bool = False  # a space is put before the text only
    characters: bytes = b""  # its compiled normalisation of single characters
    collapses: bool = False  # several spaces are one, and those at the end none

    def parts(self) -> tuple[Json | None, Json | None, Json]:
        """Normalizer, pre-tokenizer and decoder of a tokenizer.json."""
        steps: list[Json] = []
        cut: Json | None = None
        if self.characters:
            charsmap = b64encode(self.characters).decode()
            steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
        if self.collapses:
            steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
            steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        if self.prefix and self.prefix_once:
            cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        else:
            if self.prefix:
                steps.append({"type": "Prepend", "prepend": "▁"})
            steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
        decoders: list[Json] = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if self.prefix:
            decoders.append(_NO_FIRST_SPACE)
        normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
        return normalizer, cut, {"type": "Sequence", "decoders": decoders}


def byte_level_bpe(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    added: Iterable[AddedToken],
    cut: PreTokenizer,
    *,
    bos: AddedToken | None = None,
) -> Json:
    """GPT-2's kind: bytes as printable characters, merged by rank. `bos` is put in front of every text."""
    model = _bpe(vocab, merges) | {"ignore_merges": cut.ignore_merges}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return _whole(model, added, cut.normalizer, cut.json, decoder, bos)


def sentencepiece_bpe(
    vocab: dict[str, int],
    scores: Sequence[float],
    added: Iterable[AddedToken],
    *,
    mergeable: Iterable[str],
    unknown: str | None,
    byte_fallback: bool,
    spaces: Spaces,
    bos: AddedToken | None = None,
) -> Json:
    """SentencePiece's kind of merges: the pair with the best score first. `scores` by id."""
    model = _bpe(vocab, merges_of_scores(vocab, scores, mergeable)) | {
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
    }
    normalizer, cut, decoder = spaces.parts()
    return _whole(model, added, normalizer, cut, decoder, bos)


def unigram(
    pieces: Sequence[tuple[str, float]],
    added: Iterable[AddedToken],
    *,
    unknown: int | None,
    byte_fallback: bool,
    spaces: Spaces,
    bos: AddedToken | None = None,
) -> Json:
    """SentencePiece's other kind: the likeliest way to cut a text into pieces. See `sentencepiece_bpe`."""
    model = {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": byte_fallback}
    normalizer, _, decoder = replace(spaces, prefix=False).parts()
    scheme = "never" if not spaces.prefix else "first" if spaces.prefix_once else "always"
    cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    if spaces.prefix:
        decoder["decoders"].append(_NO_FIRST_SPACE)
    return _whole(model, added, normalizer, cut, decoder, bos)


def merges_of_scores(
    vocab: dict[str, int], scores: Sequence[float], mergeable: Iterable[str]
) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best-scored piece first; pairs of one piece by their ids."""
    ranked: list[tuple[float, int, int, int, tuple[str, str]]] = []
    for piece in mergeable:
        index = vocab[piece]
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], index, left, right, (piece[:cut], piece[cut:])))
    ranked.sort()
    return [pair for *_, pair in ranked]


def _bpe(vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _whole(
    model: Json,
    added: Iterable[AddedToken],
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    decoder: Json,
    bos: AddedToken | None,
) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token.id,
                "content": token.content,
                "single_word": token.single_word,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "normalized": token.normalized,
                "special": token.special,
            }
            for token in sorted(added, key=lambda token: token.id)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if bos is None else _in_front(bos),
        "decoder": decoder,
        "model": model,
    }


def _in_front(bos: AddedToken) -> Json:
    """The post-processor that puts one mark before a text."""
    mark = {"SpecialToken": {"id": bos.content, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [mark, first],
        "pair": [mark, first, mark | {}, second],
        "special_tokens": {bos.content: {"id": bos.content, "ids": [bos.id], "tokens": [bos.content]}},
    }


def write_tokenizer(tokenizer: Json, file: Path) -> bytes:
    """The bytes of a tokenizer.json that was made here, once the tokenizers library has read them.

    Raises CheckpointError naming `file`, whose vocabulary is at fault.
    """
    try:
        text = json.dumps(tokenizer, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CheckpointError("its vocabulary holds tokens that are not text", file=file) from None
    check_tokenizer(text, file)
    return text


def check_tokenizer(text: bytes, file: Path) -> None:
    """Raise CheckpointError, naming `file`, unless the tokenizers library can use this tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text.decode())
    except BaseException as error:  # the library raises Exception, and a BaseException when it panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"the tokenizer cannot be used: {error}", file=file) from None
