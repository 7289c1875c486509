"""Owns the file of API keys: what a line of it says, and how a key is hashed. No state; any thread.

The file has a JSON object a line, so that a key is added by appending, and a fault is one line's. Empty lines and those that
begin with `#` are passed over. A key is never in it, only its SHA-256. A slow hash (scrypt) protects what can be guessed; a
random key of 256 bits cannot be, and a fast digest lets a request be told apart from a flood of wrong keys at no cost.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

MAX_FILE_BYTES: Final = 4 << 20

SCHEME: Final = "sha256:"
_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)

Positive = Annotated[int, Meta(ge=1, le=1 << 40)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")]


class KeysError(Exception):
    """A file of keys that cannot be used, or a change to it that cannot be made; the message names the line."""


class KeyEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """One line: whose key it is, what it may do, and for how long. A limit that is left out is none."""

    name: Name
    hash: str
    tenant: Name | None = None  # none: the key's own name
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None  # of prompts and answers together
    max_streams: Positive | None = None  # answers in the making at once
    models: tuple[str, ...] | None = None
    expires: datetime | None = None

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the key, 32 bytes."""
        return bytes.fromhex(self.hash.removeprefix(SCHEME))

    @property
    def handle(self) -> str:
        """What the process calls this very key: another one of the same name has another. Never shown."""
        return f"{self.name}#{self.hash[len(SCHEME) : len(SCHEME) + 16]}"

    @property
    def owner(self) -> str:
        """The tenant."""
        return self.tenant or self.name

    def is_over(self, now_s: float) -> bool:
        """Whether the key has expired at `now_s`, in seconds since 1970."""
        return self.expires is not None and now_s >= self.expires.timestamp()

    def may_use(self, model_id: str) -> bool:
        """Whether the key may ask this model."""
        return self.models is None or model_id in self.models


_decode = msgspec.json.Decoder(KeyEntry).decode


def digest_of(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def read_entries(data: bytes) -> list[KeyEntry]:
    """The entries of a file. Raises `KeysError` naming the first line at fault."""
    if len(data) > MAX_FILE_BYTES:
        raise KeysError(f"{len(data)} bytes; at most {MAX_FILE_BYTES} are read")
    entries: list[KeyEntry] = []
    names: set[str] = set()
    digests: set[bytes] = set()
    for number, line in enumerate(data.split(b"\n"), 1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        try:
            entry = _decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KeysError(f"line {number}: {_said(error)}") from None
        if not _HASH.fullmatch(entry.hash):
            raise KeysError(f"line {number}: hash is not sha256: and 64 hexadecimal digits, lower case")
        if entry.expires is not None and entry.expires.tzinfo is None:
            raise KeysError(f"line {number}: expires has no time zone; write 2027-01-31T00:00:00Z")
        if entry.name in names or entry.digest in digests:
            raise KeysError(f"line {number}: this {'name' if entry.name in names else 'hash'} stands above")
        names.add(entry.name)
        digests.add(entry.digest)
        entries.append(entry)
    return entries


def _said(error: Exception) -> str:
    """What is wrong, without what the line holds: somebody may have put a key there."""
    text = str(error)
    return text[:200] if isinstance(error, msgspec.ValidationError) else f"not JSON ({type(error).__name__})"


def load(path: Path) -> list[KeyEntry]:
    """The entries of the file at `path`. Raises `KeysError`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysError(error.strerror or type(error).__name__) from None
    return read_entries(data)
