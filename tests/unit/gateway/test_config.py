"""Settings: what is accepted, and that mistakes are named."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.access import Access
from gateway.config import ConfigError, GatewayConfig, load


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEGAS_GATEWAY_WORKERS", "ipc:///tmp/a, tcp://10.0.0.1:5000")
    monkeypatch.setenv("DEGAS_GATEWAY_PORT", "0")
    config = load({"host": "0.0.0.0"})
    assert config.workers == ("ipc:///tmp/a", "tcp://10.0.0.1:5000")
    assert (config.host, config.port, config.host_names()) == ("0.0.0.0", 0, None)


def test_an_unknown_variable_is_refused_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEGAS_GATEWAY_MAX_QUEU", "5")
    with pytest.raises(ConfigError, match="did you mean DEGAS_GATEWAY_MAX_QUEUE"):
        load()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prot": 1}, "prot"),
        ({"port": 70000}, "port"),
        ({"workers": "http://x"}, "ipc://<path>, tcp://"),
        ({"workers": "ipc:///a,ipc:///a"}, "twice"),
        ({"public": "everything"}, "page, readiness, metrics"),
        ({"cors_origins": "example.com"}, "https://app.example"),
        ({"api_keys": "short"}, "8 characters"),
        ({"max_image_bytes": 100 << 20}, "max_body_bytes must be at least"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(settings)


def test_it_is_frozen_and_keeps_keys_to_itself() -> None:
    config = load({"api_keys": "very-secret-key"})
    with pytest.raises(Exception, match="frozen"):
        config.port = 1  # type: ignore[misc]
    assert "very-secret-key" not in repr(config) and config.key_texts() == ("very-secret-key",)


def access(**settings: Any) -> Access:
    return Access(GatewayConfig(**settings))


def test_tenants() -> None:
    assert access().owner(None) == ("", "") and not access().needs_key
    locked = access(api_keys="key-number-1,key-number-2")
    assert locked.owner(None) is None and locked.owner("nope") is None
    one, two = locked.owner("key-number-1"), locked.owner("key-number-2")
    assert one and two and one.tenant != two.tenant and "key" not in one.tenant


def test_websocket_origins() -> None:
    own = access()
    assert own.origin_allowed(None, "localhost:8080")
    assert own.origin_allowed("http://localhost:8080", "localhost:8080")
    for origin in ("http://evil.example", "null", "", "http://localhost:8081", "file://", "http://[bad"):
        assert not own.origin_allowed(origin, "localhost:8080"), origin
    assert access(cors_origins="https://a.example").origin_allowed("https://a.example", "localhost:8080")
