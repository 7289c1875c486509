"""Owns origins as browsers and their relatives send them: which spellings a setting takes, and which header matches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

_SCHEME: Final = r"[A-Za-z][A-Za-z0-9+.-]*"
_ORIGIN: Final = re.compile(
    rf"(?P<scheme>{_SCHEME})://(?P<wild>\*\.)?(?P<host>[^\s/?#@:\[\]*]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{{1,5}}))?"
)
_DEFAULT_PORTS: Final = {"http": "80", "https": "443", "ws": "80", "wss": "443"}


def read_origin(given: str) -> str:
    """A configured origin as browsers spell it: lower case, Punycode, without a default port. Raises ValueError."""
    if given in ("*", "null"):
        return given
    match = _ORIGIN.fullmatch(given)
    if match is None or int(match["port"] or 0) > 65535:
        raise ValueError(
            f"{given!r} is not an origin such as https://app.example, https://*.app.example (its subdomains), "
            "app://obsidian.md or null, without a path; or * for any"
        )
    scheme, host, port = match["scheme"].lower(), match["host"], match["port"]
    if not host.isascii():
        host = host.encode("idna").decode()
    tail = f":{port}" if port is not None and port != _DEFAULT_PORTS.get(scheme) else ""
    return f"{scheme}://{match['wild'] or ''}{host.lower()}{tail}"


class Origins:
    """The configured ones."""

    def __init__(self, configured: Sequence[str]) -> None:
        """`configured` as `read_origin` returns them."""
        self._any = "*" in configured
        self._exact = frozenset(one for one in configured if "*" not in one)
        self._wild = [tuple(one.split("*", 1)) for one in configured if "*." in one]

    def allow(self, origin: str) -> bool:
        """Whether a page of this origin may call. A wildcard stands for one label or more, never for none."""
        if self._any:
            return True
        given = origin.lower()
        if given in self._exact:
            return True
        return any(
            given.startswith(before) and given.endswith(behind) and _labels(given[len(before) : -len(behind)])
            for before, behind in self._wild
        )


def _labels(text: str) -> bool:
    return re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", text, re.ASCII) is not None


def same_site(origin: str, host: str | None) -> bool:
    """Whether a page of `origin` came from `host`, as the `Host` header says it."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return bool(parts.netloc) and host is not None and parts.netloc.lower() == host.lower()
