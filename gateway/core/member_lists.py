"""Owns reading a list of workers that somebody else keeps: a file, or a page over HTTP. Gateway's loop; files are read on threads.

The list is text with one `tcp://<host>:<port>` a line; empty lines and those that begin with `#` are passed over. Whoever
writes a file replaces it whole (writes another one and renames it), so that nobody reads half of it.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final

import aiohttp

FILE: Final = "file://"
HTTP: Final = ("http://", "https://")
MAX_LIST_BYTES: Final = 256 << 10
MAX_PORT: Final = 65535
READ_TIMEOUT_S: Final = 10.0

_ENDPOINT: Final = re.compile(r"tcp://(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]+):\d{1,5}", re.ASCII)


def parse(text: str) -> frozenset[str]:
    """The endpoints of a list, none for an empty one. Raises ValueError that names the first line that is none."""
    found = set()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not _ENDPOINT.fullmatch(line) or not 0 < int(line.rpartition(":")[2]) <= MAX_PORT:
            raise ValueError(f"line {number} is {line[:80]!r}, not tcp://<host>:<port>")
        found.add(line)
    return frozenset(found)


async def read_file(path: Path) -> frozenset[str]:
    """The endpoints that a file lists. Raises OSError, ValueError (UnicodeError is one)."""
    return parse(_decode(await asyncio.to_thread(_read_bytes, path)))


async def read_page(url: str) -> frozenset[str]:
    """The endpoints that a page lists; redirects are not followed. Raises OSError, ValueError."""
    try:
        timeout = aiohttp.ClientTimeout(total=READ_TIMEOUT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            data = b""
            async for part in answer.content.iter_any():
                data += part
                if len(data) > MAX_LIST_BYTES:
                    break
    except aiohttp.ClientError as error:
        raise OSError(str(error) or type(error).__name__) from None
    return parse(_decode(data))


def _read_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_LIST_BYTES + 1)


def _decode(data: bytes) -> str:
    if len(data) > MAX_LIST_BYTES:
        raise ValueError(f"longer than {MAX_LIST_BYTES} bytes")
    return data.decode()
