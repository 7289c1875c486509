"""Owns tokenizers: loading one from a worker's `Ready`, encoding, decoding, and detokenising piece by piece.

Runs on the gateway's loop; long texts are encoded on a thread by `gateway.core.service` (the tokenizer releases
the global lock). Detokenizers hold per-stream state and are injected into `gateway.decisions.stream`.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from gateway.core.special_text import SpecialText
from gateway.native.burst import TokenTextTable, text_table

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenizerError(Exception):
    """A tokenizer file that cannot be used."""


class ModelTokens:
    """One tokenizer, and what detokenising with it needs.

    SentencePiece's decoder drops a text's first space. This one keeps it, because a stream may continue other text and
    single tokens' texts must join; `decode`, for whole texts, drops the space itself.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        """Parse a tokenizer.json. Raises `TokenizerError`."""
        try:
            layout: dict[str, Any] = msgspec.json.decode(tokenizer_json)
            decoder, self.drops_first_space = _without_first_space(layout.get("decoder"))
            self._json = tokenizer_json.decode()
            if self.drops_first_space:
                self._json = msgspec.json.encode({**layout, "decoder": decoder}).decode()
            self._tokenizer = _read(self._json)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"the worker's tokenizer cannot be read: {error}") from None
        # Metaspace drops what stands for a space in words, not a space that was spelt as a byte.
        self._keeps_space_byte = '"Metaspace"' in msgspec.json.encode(layout.get("decoder")).decode()
        self.digest = hashlib.sha256(tokenizer_json).hexdigest()
        self._tokenizer.encode_special_tokens = True  # what a user types is text, never a control token
        self._parsing: Tokenizer | None = None
        self._aliased: tuple[Tokenizer, dict[int, int]] | None = None
        self._special = [token for token in layout.get("added_tokens", []) if token.get("special")]
        self._special_ids: dict[str, int] = {token["content"]: token["id"] for token in self._special}
        self._mark_ids: dict[str, int] = {
            token["content"]: token["id"] for token in layout.get("added_tokens", [])
        }
        self.special_ids = frozenset(self._special_ids.values())
        self.special_text = SpecialText([token["content"] for token in self._special])
        # What the post-processor puts in front of a text; where there is none, texts begin with their first word.
        self.start_ids: list[int] = self._tokenizer.encode("", add_special_tokens=True).ids
        self._token_bytes: list[bytes] | None = None
        self._table: TokenTextTable | None = None
        self._is_making_table = False
        self._whole: dict[
            int, str
        ] = {}  # texts of shown tokens that are whole characters, once they were needed
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
        """As `encode`, but special tokens' names in the text become those tokens."""
        if self._parsing is None:
            self._parsing = _read(self._json)
        ids: list[int] = self._parsing.encode(text, add_special_tokens=False).ids
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """As `encode_parsed`, for the text of `ChatTemplate.render_guarded`: users' words stay text."""
        if not self.special_text.has_stand_ins(text):
            return self.encode_parsed(text)
        if self._aliased is None:
            self._aliased = self._with_aliases()
        tokenizer, own_ids = self._aliased
        ids = tokenizer.encode(self.special_text.with_aliases(text), add_special_tokens=False).ids
        return [own_ids.get(token_id, token_id) for token_id in ids]

    def decode(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of all ids at once."""
        text = self.decode_on(token_ids, keep_special=keep_special)
        if not self.drops_first_space or not text.startswith(" "):
            return text
        if self._keeps_space_byte:
            first = next((i for i in token_ids if keep_special or self.is_shown(i)), -1)
            if first in self._partial_ids:
                return text
        return text[1:]

    def decode_on(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of ids that stand within a text: a first space is kept."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=not keep_special)
        return text

    def token_text(self, token_id: int) -> str:
        """One token's own text, special or not; "" for an id outside the vocabulary."""
        return self.decode_on([token_id], keep_special=True)

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

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this name, if there is one."""
        return self._special_ids.get(text)

    def mark_id(self, text: str) -> int | None:
        """The id of the added token, special or not, that is this text: no other tokens ever spell it."""
        return self._mark_ids.get(text)

    def detokenizer(self, *, shown: Collection[int] = ()) -> ByteDetokenizer | WindowDetokenizer:
        """A fresh one for one stream. `shown`: special tokens that have their text in it."""
        skipped = self.special_ids.difference(shown) if shown else self.special_ids
        if self._token_bytes is not None:
            whole = {} if shown else self._whole
            return ByteDetokenizer(self._token_bytes, skipped, whole, None if shown else self.text_table)
        return WindowDetokenizer(self, skipped, self._partial_ids)

    def text_table(self) -> TokenTextTable | None:
        """Texts of single tokens for the compiled loop; None until they are made. Asked for once there is such a loop, and by
        detokenizers whose tokens' texts do not depend on those around them."""
        if self._table is None and not self._is_making_table:
            self._is_making_table = (
                True  # for good: a table that cannot be had is not asked for with every token
            )
            threading.Thread(target=self._make_table, name="token-texts", daemon=True).start()
        return self._table

    def _make_table(self) -> None:
        """On a thread of its own: a large vocabulary takes some tens of milliseconds."""
        assert self._token_bytes is not None
        self._table = text_table(self._token_bytes, self.special_ids)

    def _with_aliases(self) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer that reads special tokens' names as text and their aliases as the tokens; and the aliases' ids."""
        tokenizer = _read(self._json)
        tokenizer.encode_special_tokens = True
        own_ids: dict[int, int] = {}
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        for token in self._special:
            alias = self.special_text.alias(token["content"])
            tokenizer.add_tokens([AddedToken(alias, special=False, **{name: token[name] for name in flags})])
            alias_id = tokenizer.token_to_id(alias)
            assert alias_id is not None
            own_ids[alias_id] = token["id"]
        return tokenizer, own_ids

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
    """For byte-level BPE: bytes of each token, decoded as far as they are whole characters.

    `whole` remembers texts between characters, for all streams that skip the same tokens.
    """

    __slots__ = ("_held", "_skipped", "_table", "_texts", "_whole")

    def __init__(
        self,
        table: list[bytes],
        skipped: frozenset[int],
        whole: dict[int, str],
        texts: Callable[[], TokenTextTable | None] | None = None,
    ) -> None:
        """`texts`: makes or finds the table of single tokens' texts, with the same tokens skipped."""
        self._texts = texts
        self._table = table
        self._skipped = skipped
        self._whole = whole
        self._held = b""  # the beginning of a character

    def step(self, token_id: int) -> str:
        """See `gateway.decisions.stream.Detokenizer`. An id outside the vocabulary has no text."""
        if not self._held and (known := self._whole.get(token_id)) is not None:
            return known
        if token_id in self._skipped or not 0 <= token_id < len(self._table):
            return ""
        data = self._held + self._table[token_id]
        text, used = codecs.utf_8_decode(data, "replace", False)
        if not self._held and used == len(data):
            self._whole[token_id] = text
        self._held = data[used:]
        return text

    def text_table(self) -> TokenTextTable | None:
        """The texts that its next tokens will have; None inside a character, and where nobody knows them."""
        return None if self._held or self._texts is None else self._texts()

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that are whole characters each."""
        return b"".join([self._table[token_id] for token_id in token_ids]).decode()

    def flush(self) -> str:
        """See `gateway.decisions.stream.Detokenizer`."""
        held, self._held = self._held, b""
        return held.decode(errors="replace")


class WindowDetokenizer:
    """For every other decoder: decode a short window twice, with and without the new tokens.

    Byte-fallback tokens wait for the first token of another kind: their decoder decodes a whole run of bytes at
    once, so the text of a run is known only when the run ends.
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
        decode = self._tokens.decode_on
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


def _read(text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_first_space(decoder: Any) -> tuple[Any, bool]:
    """A decoder's description without the parts that drop a text's first space, and whether there were any."""
    if not isinstance(decoder, dict):
        return decoder, False
    if decoder.get("type") == "Sequence":
        parts = [_without_first_space(part) for part in decoder.get("decoders", [])]
        return {**decoder, "decoders": [part for part, _ in parts]}, any(dropped for _, dropped in parts)
    if decoder.get("type") == "Strip" and decoder.get("content") == " " and decoder.get("start") == 1:
        return {**decoder, "start": 0}, True
    if decoder.get("type") == "Metaspace":
        drops = decoder.get("prepend_scheme", "always") != "never" and decoder.get("add_prefix_space", True)
        kept = {name: value for name, value in decoder.items() if name != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}, drops
    return decoder, False


def _is_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "ByteLevel":
        return True
    return decoder.get("type") == "Sequence" and [
        part.get("type") for part in decoder.get("decoders", [])
    ] == ["ByteLevel"]
