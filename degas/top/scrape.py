"""Owns one reading of a server: its metrics and models, or why there are none. Runs on a thread for each server."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Final
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

MAX_BYTES: Final = 16 << 20
_AWAY: Final = (OSError, HTTPException)

Labels = Mapping[str, str]
Samples = Mapping[str, list[tuple[Labels, float]]]


@dataclass(frozen=True, slots=True)
class Scrape:
    """What a server said at one moment. With an `error` there are no samples."""

    url: str
    at_s: float  # `time.monotonic()`
    samples: Samples = field(default_factory=dict)
    models: tuple[dict[str, Any], ...] = ()
    error: str = ""

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over a metric's samples that have these labels; None where there is none."""
        found = [
            value
            for own, value in self.samples.get(name, ())
            if all(own.get(key) == wanted for key, wanted in labels.items())
        ]
        return sum(found) if found else None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key must not follow a redirect to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())


def check_url(url: str) -> str:
    """The address without a slash behind it. Raises `ValueError` unless it is one of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server; it should look like http://127.0.0.1:8080")
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1")


def fetch(url: str, key: str | None, timeout_s: float) -> Scrape:
    """Read `/metrics` and `/v1/models` of one server. What goes wrong is in the result; nothing is raised."""
    try:
        text = _get(url + "/metrics", key, timeout_s)
        at_s = time.monotonic()
        samples = parse(text.decode())
    except urllib.error.HTTPError as error:
        return Scrape(url, time.monotonic(), error=_refusal(error))
    except (UnicodeDecodeError, ValueError):
        return Scrape(url, time.monotonic(), error="what /metrics answers is no metrics text")
    except _AWAY as error:
        return Scrape(url, time.monotonic(), error=f"does not answer: {_reason(error)}")
    return Scrape(url, at_s, samples, _models(url, key, timeout_s))


def parse(text: str) -> dict[str, list[tuple[Labels, float]]]:
    """The samples of Prometheus' text format by name. Raises `ValueError` for anything else."""
    samples: dict[str, list[tuple[Labels, float]]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    except (KeyError, IndexError) as error:  # what the parser makes of damaged lines
        raise ValueError(str(error)) from None
    return samples


def _models(url: str, key: str | None, timeout_s: float) -> tuple[dict[str, Any], ...]:
    """Models, where they may be read: metrics may be open where this needs a key."""
    try:
        data = json.loads(_get(url + "/v1/models", key, timeout_s))["data"]
        return tuple(one for one in data if isinstance(one, dict))
    except (*_AWAY, ValueError, KeyError, TypeError):
        return ()


def _get(url: str, key: str | None, timeout_s: float) -> bytes:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=timeout_s) as answer:
        return bytes(answer.read(MAX_BYTES))


def _refusal(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return (
            "needs a key: name its variable with --api-key-env, or open `metrics` with the gateway's --public"
        )
    return f"/metrics answers {error.code}; is this a gateway of Degas?"


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or str(reason) or type(error).__name__
