"""Owns who may call: keys, `Host` names and origins. Used by every transport on the gateway's loop."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping

from gateway.config import GatewayConfig
from gateway.generation import RequestError
from gateway.origins import Origins, same_site
from shared.errors import ErrorCode

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253})(:(?P<port>\d{1,5}))?", re.ASCII)


class Access:
    """The configured keys, host names and origins."""

    def __init__(self, config: GatewayConfig) -> None:
        self._keys = [key.encode() for key in config.key_texts()]
        self._tenants = [hashlib.sha256(key).hexdigest()[:16] for key in self._keys]
        self._hosts = config.host_names()
        self._origins = Origins(config.cors_origins)

    @property
    def needs_key(self) -> bool:
        """Whether any key is configured; without one everybody who reaches the port may call."""
        return bool(self._keys)

    def tenant(self, key: str | None) -> str | None:
        """The tenant that a key belongs to; None for a wrong key; "" for everybody where no keys are set.

        The key is compared with every configured one in constant time, so that timing shows nothing.
        """
        if not self._keys:
            return ""
        given = (key or "").encode(errors="surrogateescape")
        found: str | None = None
        for own, tenant in zip(self._keys, self._tenants, strict=True):
            if hmac.compare_digest(own, given):
                found = tenant
        return found

    @property
    def tenant_names(self) -> dict[str, str]:
        """What tenants are called where others may read it: the first key's is `key-1`. Nothing in a name is a key's."""
        return {tenant: f"key-{number}" for number, tenant in enumerate(self._tenants, 1)}

    def authenticate(self, headers: Mapping[str, str]) -> str:
        """The caller's tenant. Raises `RequestError` UNAUTHORIZED."""
        key = key_of(headers)
        tenant = self.tenant(key)
        if tenant is None:
            if key is None:
                message = "this server needs an API key: send Authorization: Bearer <key>"
            else:
                message = "the API key is wrong"
            raise RequestError(ErrorCode.UNAUTHORIZED, message)
        return tenant

    def check_host(self, host: str | None) -> None:
        """Raises `RequestError` INVALID_REQUEST for a malformed or foreign `Host` (DNS rebinding)."""
        match = _HOST.fullmatch(host or "")
        if match is None or int(match["port"] or 0) > 65535:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the Host header is missing or malformed")
        if self._hosts is not None and match["name"].lower() not in self._hosts:
            message = "this Host is not served here; add it to allowed_hosts (DEGAS_GATEWAY_ALLOWED_HOSTS)"
            raise RequestError(ErrorCode.INVALID_REQUEST, message)

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
