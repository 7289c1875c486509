"""Owns changing the file of API keys: a new key, a line more, a line less. One short run, no threads.

Whoever reads the file meanwhile sees the old one or the new one, never a part.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from gateway.keys import SCHEME, KeyEntry, KeysError, digest_of, read_entries

KEY_PREFIX: Final = "sk-degas-"
"""How every key made here begins; `shared.redaction` knows it."""


def new_key() -> tuple[str, str]:
    """A fresh random key of 256 bits, and its `hash`."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, SCHEME + digest_of(key.encode()).hex()


def add(path: Path, entry: KeyEntry) -> None:
    """Append an entry. A file that is not there is made, readable by its owner only. Raises `KeysError`, `OSError`."""
    data = path.read_bytes() if path.exists() else b""
    if any(held.name == entry.name for held in read_entries(data)):
        raise KeysError(f"there is a key called {entry.name}; revoke it first, or take another name")
    if data and not data.endswith(b"\n"):
        data += b"\n"
    _replace(path, data + msgspec.json.encode(entry) + b"\n")


def remove(path: Path, name: str) -> None:
    """Take out the entry of this name; every other line stays as it is. Raises `KeysError`, `OSError`."""
    data = path.read_bytes()
    if all(entry.name != name for entry in read_entries(data)):
        raise KeysError(f"there is no key called {name}")
    lines = data.splitlines(keepends=True)
    _replace(path, b"".join(line for line in lines if not _names(line, name)))


def _names(line: bytes, name: str) -> bool:
    text = line.strip()
    return bool(text) and not text.startswith(b"#") and read_entries(text)[0].name == name


def _replace(path: Path, data: bytes) -> None:
    """Put a whole file in place of the old one: whoever reads sees one or the other."""
    read_entries(data)
    handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(fresh).replace(path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise
