"""Owns reading SentencePiece's tokenizer.model, and making a tokenizer.json of it. Any thread.

The file is one protocol-buffers message. The few fields that matter are read here, each bound checked, so that no
library of native code parses a stranger's file.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker.formats.errors import CheckpointError
from worker.formats.tokenizer_json import AddedToken, Spaces, sentencepiece_bpe, unigram

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_MAX_BYTES = 64 << 20
_MAX_PIECES = 4 << 20


@dataclass(slots=True)
class PieceModel:
    """What tokenizer.model says; `kinds` are SentencePiece's types of pieces."""

    path: Path
    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    is_unigram: bool = True
    unknown_id: int = 0
    adds_prefix: bool = True
    collapses_spaces: bool = True
    characters: bytes = b""  # the compiled normalisation of single characters; empty: none

    def marks(self) -> dict[str, int]:
        """Ids of control, user-defined and unknown pieces by their text."""
        kinds = (_CONTROL, _USER_DEFINED, _UNKNOWN)
        return {
            text: index
            for index, (text, kind) in enumerate(zip(self.pieces, self.kinds, strict=True))
            if kind in kinds
        }


def read_model(path: Path) -> PieceModel:
    """Read the file. Raises CheckpointError, by name where it is a tiktoken vocabulary of that name."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"larger than {_MAX_BYTES >> 20} MiB: no SentencePiece model", file=path)
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"not readable: {error.strerror or error}", file=path) from error
    _refuse_tiktoken(data, path)
    model = PieceModel(path)
    try:
        _fill(model, data)
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"not a SentencePiece model: {error}", file=path) from None
    if not model.pieces:
        raise CheckpointError("a SentencePiece model without pieces", file=path)
    # Marks are looked for in the text as typed, before spaces become ▁, so their ▁ are written as spaces.
    model.pieces = [
        text.replace("▁", " ") if kind == _USER_DEFINED else text
        for text, kind in zip(model.pieces, model.kinds, strict=True)
    ]
    if len(set(model.pieces)) != len(model.pieces):
        raise CheckpointError("a SentencePiece model with a piece twice", file=path)
    return model


def tokenizer_of_model(
    model: PieceModel, added: list[AddedToken], *, bos: str, prefix_once: bool
) -> dict[str, Any]:
    """tokenizer.json's content. `added` overrides the model's marks; `bos` is put before every text, empty for none."""
    named = {token.id: token for token in added}
    for text, index in model.marks().items():
        named.setdefault(index, AddedToken(index, text, special=model.kinds[index] != _USER_DEFINED))
    mark = next((token for token in named.values() if token.content == bos), None) if bos else None
    ids = {text: index for index, text in enumerate(model.pieces)}
    unknown = model.unknown_id if 0 <= model.unknown_id < len(model.pieces) else None
    byte_fallback = _BYTE in model.kinds
    spaces = Spaces(
        model.adds_prefix,
        prefix_once=prefix_once,
        characters=model.characters,
        collapses=model.collapses_spaces and bool(model.characters),
    )
    if model.is_unigram:
        pieces = list(zip(model.pieces, model.scores, strict=True))
        return unigram(
            pieces, named.values(), unknown=unknown, byte_fallback=byte_fallback, spaces=spaces, bos=mark
        )
    return sentencepiece_bpe(
        ids,
        model.scores,
        named.values(),
        mergeable=[
            text for text, kind in zip(model.pieces, model.kinds, strict=True) if kind in (_NORMAL, _UNUSED)
        ],
        unknown=None if unknown is None else model.pieces[unknown],
        byte_fallback=byte_fallback,
        spaces=spaces,
        bos=mark,
    )


def _refuse_tiktoken(data: bytes, path: Path) -> None:
    first = data[:200].split(b"\n", 1)[0].split(b" ")
    if len(first) == 2 and first[1].isdigit():
        try:
            base64.b64decode(first[0], validate=True)
        except binascii.Error:
            return
        raise CheckpointError(
            "a tiktoken vocabulary, which does not say how text is cut; download the tokenizer.json of the same model",
            file=path,
        )


def _fill(model: PieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            if len(model.pieces) >= _MAX_PIECES:
                raise ValueError("too many pieces")
            text, score, kind = "", 0.0, _NORMAL
            for inner, found in _fields(value):
                if inner == 1 and isinstance(found, bytes):
                    text = found.decode("utf-8")
                elif inner == 2 and isinstance(found, bytes):
                    (score,) = struct.unpack("<f", found)
                elif inner == 3 and isinstance(found, int):
                    kind = found
            model.pieces.append(text)
            model.scores.append(score if math.isfinite(score) else 0.0)
            model.kinds.append(kind)
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
            kind_of_model = trainer.get(3, _UNIGRAM)
            if kind_of_model not in (_UNIGRAM, _BPE):
                raise ValueError(f"of type {kind_of_model!r}; unigram and BPE are read here")
            model.is_unigram = kind_of_model == _UNIGRAM
            unknown = trainer.get(40, 0)
            model.unknown_id = unknown if isinstance(unknown, int) else 0
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
            characters = normalizer.get(2, b"")
            model.characters = characters if isinstance(characters, bytes) else b""
            model.adds_prefix = bool(normalizer.get(3, 1))
            model.collapses_spaces = bool(normalizer.get(4, 1))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message: numbers as they are, all else as bytes. Raises ValueError, IndexError."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at + length > end:
            raise ValueError("cut short: the download is incomplete")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number of more than 64 bits")
