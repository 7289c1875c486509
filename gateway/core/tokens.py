"""Owns tokenizers: loading one from a worker's `Ready`, encoding, decoding, and detokenising piece by piece.

Runs on the gateway's loop; long texts are encoded on a thread by `gateway.core.service` (the tokenizer releases
the global lock). Detokenizers hold per-stream state and are injected into `gateway.decisions.stream`.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenizerError(Exception):
    """A tokenizer file that cannot be used."""


class ModelTokens:
    """One tokenizer, and what detokenising with it needs."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Parse a tokenizer.json. Raises `TokenizerError`."""
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
            layout: dict[str, Any] = msgspec.json.decode(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"the worker's tokenizer cannot be read: {error}") from None
        self.drops_first_space = False
        self.digest = hashlib.sha256(tokenizer_json).hexdigest()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # what a user types is text, never a control token
        self._json = tokenizer_json
        self._parsing: Tokenizer | None = None
        self.special_ids = frozenset(
            token["id"] for token in layout.get("added_tokens", []) if token.get("special")
        )
        self._token_bytes: list[bytes] | None = None
        self._partial_ids: frozenset[int] = frozenset()
        if _is_byte_level(layout.get("decoder")):
            self._token_bytes = self._bytes_of_ids()
        else:
            vocab = self._tokenizer.get_vocab(with_added_tokens=True)
            self._partial_ids = frozenset(i for text, i in vocab.items() if _BYTE_TOKEN.fullmatch(text))

    def matches(self, tokenizer_json: bytes) -> bool:
        """Whether this tokenizer was made from the same file."""
        return self.digest == hashlib.sha256(tokenizer_json).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens of the tokenizer's own."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_parsed(self, text: str) -> list[int]:
        """As `encode`, but special tokens written out in the text count."""
        if self._parsing is None:
            self._parsing = Tokenizer.from_str(self._json.decode())
            self._parsing.no_truncation()
            self._parsing.no_padding()
        ids: list[int] = self._parsing.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of all ids at once."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=not keep_special)
        return text

    def token_text(self, token_id: int) -> str:
        """One token's own text, special or not; "" for an id outside the vocabulary."""
        return self.decode([token_id], keep_special=True)

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, which need not be whole characters."""
        if self._token_bytes is not None:
            return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""
        piece = self._tokenizer.id_to_token(token_id)
        match = _BYTE_TOKEN.fullmatch(piece) if piece else None
        return bytes([int(match[1], 16)]) if match else self.token_text(token_id).encode()

    def is_shown(self, token_id: int) -> bool:
        """Whether an answer shows its text: special tokens' is left out."""
        return token_id not in self.special_ids

    def detokenizer(self, *, keep_special: bool = False) -> ByteDetokenizer | WindowDetokenizer:
        """A fresh one for one stream."""
        skipped = frozenset[int]() if keep_special else self.special_ids
        if self._token_bytes is not None:
            return ByteDetokenizer(self._token_bytes, skipped)
        return WindowDetokenizer(self, skipped, self._partial_ids)

    def _bytes_of_ids(self) -> list[bytes]:
        """The bytes of every id: GPT-2's printable alphabet undone; a token outside it stands for itself."""
        alphabet = byte_alphabet()
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values(), default=size - 1) + 1)
        for text, token_id in vocab.items():
            try:
                table[token_id] = bytes(alphabet[char] for char in text)
            except KeyError:
                table[token_id] = text.encode()
        return table


class ByteDetokenizer:
    """For byte-level BPE: bytes of each token through an incremental UTF-8 decoder."""

    __slots__ = ("_decode", "_skipped", "_table")

    def __init__(self, table: list[bytes], skipped: frozenset[int]) -> None:
        self._table = table
        self._skipped = skipped
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def step(self, token_id: int) -> str:
        """See `gateway.decisions.stream.Detokenizer`. An id outside the vocabulary has no text."""
        if token_id in self._skipped or not 0 <= token_id < len(self._table):
            return ""
        return self._decode(self._table[token_id])

    def flush(self) -> str:
        """See `gateway.decisions.stream.Detokenizer`."""
        return self._decode(b"", True)


class WindowDetokenizer:
    """For every other decoder: decode a short window twice, with and without the new tokens.

    Byte-fallback tokens wait for the first token that is none: their decoder judges a whole run of bytes at
    once, so what a run spells is only settled when it ends.
    """

    __slots__ = ("_num_read", "_partial", "_skipped", "_tokens", "_window")

    def __init__(self, tokens: ModelTokens, skipped: frozenset[int], partial: frozenset[int]) -> None:
        self._tokens = tokens
        self._skipped = skipped
        self._partial = partial
        self._window: list[int] = []  # tokens shown, kept as context, then tokens not shown yet
        self._num_read = 0

    def step(self, token_id: int) -> str:
        """See `gateway.decisions.stream.Detokenizer`."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        return "" if token_id in self._partial else self._show()

    def flush(self) -> str:
        """See `gateway.decisions.stream.Detokenizer`."""
        return self._show()

    def _show(self) -> str:
        decode = self._tokens.decode
        before = decode(self._window[: self._num_read], keep_special=True)
        text = decode(self._window, keep_special=True)
        if len(text) <= len(before):
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return text[len(before) :]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _is_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "ByteLevel":
        return True
    return decoder.get("type") == "Sequence" and [
        part.get("type") for part in decoder.get("decoders", [])
    ] == ["ByteLevel"]
