"""Owns who may call: keys, `Host` names and origins. Used by every transport on the gateway's loop."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from gateway.config import GatewayConfig
from gateway.generation import RequestError
from gateway.keys import KeyEntry, KeysError, digest_of, load
from gateway.origins import Origins, same_site
from shared.errors import ErrorCode
from shared.settings import ConfigError

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253})(:(?P<port>\d{1,5}))?", re.ASCII)


class Owner(NamedTuple):
    """Whose a request is: the handle of its key, and its tenant. Both are empty where no keys are set."""

    key: str = ""
    tenant: str = ""


_NOBODY = Owner()


class Access:
    """The configured keys, host names and origins. Raises `ConfigError` for a file of keys that cannot be used."""

    def __init__(self, config: GatewayConfig) -> None:
        self._keys = [key.encode() for key in config.key_texts()]
        self._owners = [
            Owner(f"api_keys[{index}]", hashlib.sha256(key).hexdigest()[:16])
            for index, key in enumerate(self._keys)
        ]
        self.keys_file = None if config.keys_file is None else Path(config.keys_file)
        self.entries: list[KeyEntry] = []
        self.num_tenants = max(1, len(self._owners))  # who may call, whether they do or not
        self._by_digest: dict[bytes, KeyEntry] = {}
        if self.keys_file is not None:
            try:
                self.use(load(self.keys_file))
            except KeysError as error:
                raise ConfigError(f"keys_file {self.keys_file}: {error}") from None
        self._last_host: str | None = None  # one that passed; most requests of a server name the same
        self._hosts = config.host_names()
        self._origins = Origins(config.cors_origins)

    @property
    def needs_key(self) -> bool:
        """Whether any key is configured; without one everybody who reaches the port may call."""
        return bool(self._keys) or self.keys_file is not None

    def use(self, entries: Iterable[KeyEntry]) -> None:
        """These are the file's keys from now on."""
        self.entries = list(entries)
        self._by_digest = {entry.digest: entry for entry in self.entries}
        self.num_tenants = max(1, len(self.tenant_names))

    def owner(self, key: str | None) -> Owner | None:
        """Whose a key is; None for one that is wrong or has expired. Nobody's where no keys are set.

        The key is compared with each one of the settings in constant time. Those of the file are found by their digest, in
        a table whose order depends on a secret of this process: time tells nothing about a key from which it could be made.
        """
        if not self.needs_key:
            return Owner()
        given = (key or "").encode(errors="surrogateescape")
        found: Owner | None = None
        for own, owner in zip(self._keys, self._owners, strict=True):
            if hmac.compare_digest(own, given):
                found = owner
        if found is not None or not self._by_digest:
            return found
        entry = self._by_digest.get(digest_of(given))
        if entry is None or entry.is_over(time.time()):
            return None
        return Owner(entry.handle, entry.owner)

    @property
    def tenant_names(self) -> dict[str, str]:
        """What tenants are called where others may read it: those of the settings' keys `key-1` and so on, for nothing in a name
        is a key's; the file's by their own names."""
        names = {owner.tenant: f"key-{number}" for number, owner in enumerate(self._owners, 1)}
        return names | {entry.owner: entry.owner for entry in self.entries}

    def authenticate(self, headers: Mapping[str, str]) -> Owner:
        """Whose a request is. Raises `RequestError` UNAUTHORIZED."""
        if not self.needs_key:
            return _NOBODY
        key = key_of(headers)
        owner = self.owner(key)
        if owner is None:
            if key is None:
                message = "this server needs an API key: send Authorization: Bearer <key>"
            else:
                message = "the API key is wrong"
            raise RequestError(ErrorCode.UNAUTHORIZED, message)
        return owner

    def check_host(self, host: str | None) -> None:
        """Raises `RequestError` INVALID_REQUEST for a malformed or foreign `Host` (DNS rebinding)."""
        if host is not None and host == self._last_host:
            return
        match = _HOST.fullmatch(host or "")
        if match is None or int(match["port"] or 0) > 65535:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the Host header is missing or malformed")
        if self._hosts is not None and match["name"].lower() not in self._hosts:
            message = "this Host is not served here; add it to allowed_hosts (DEGAS_GATEWAY_ALLOWED_HOSTS)"
            raise RequestError(ErrorCode.INVALID_REQUEST, message)
        self._last_host = host

    def cors_origin(self, origin: str | None) -> str | None:
        """The value for `Access-Control-Allow-Origin`, or None when this origin gets none."""
        return origin if origin is not None and self._origins.allow(origin) else None

    def origin_allowed(self, origin: str | None, host: str | None) -> bool:
        """Whether a browser page from `origin` may open a WebSocket: the page itself, or a configured origin.

        No `Origin` means no browser, so there is nothing to protect it from.
        """
        if origin is None or self.cors_origin(origin) is not None:
            return True
        return same_site(origin, host)


def key_of(headers: Mapping[str, str]) -> str | None:
    """The key a client sent, as OpenAI's clients do, or as Anthropic's or Moondream's do."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("X-Api-Key") or headers.get("X-Moondream-Auth") or None
