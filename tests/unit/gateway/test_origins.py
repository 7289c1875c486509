"""Origins as browsers and their relatives send them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import ConfigError, load
from gateway.origins import Origins, read_origin

TAKEN = {
    "*": "*",
    "null": "null",
    "https://app.example": "https://app.example",
    "HTTPS://App.Example": "https://app.example",
    "https://app.example:443": "https://app.example",
    "http://app.example:80": "http://app.example",
    "http://localhost:3000": "http://localhost:3000",
    "http://[::1]:3000": "http://[::1]:3000",
    "https://bücher.example": "https://xn--bcher-kva.example",
    "https://*.example.com": "https://*.example.com",
    "app://obsidian.md": "app://obsidian.md",
    "tauri://localhost": "tauri://localhost",
    "capacitor://localhost": "capacitor://localhost",
    "vscode-webview://1a2b": "vscode-webview://1a2b",
    "chrome-extension://aaaabbbbccccddddeeeeffffgggghhhh": "chrome-extension://aaaabbbbccccddddeeeeffffgggghhhh",
    "moz-extension://1b0c-22": "moz-extension://1b0c-22",
}
REFUSED = [
    "app.example",
    "https://app.example/",
    "https://app.example/path",
    "https://",
    "https://a b",
    "https://app.example:99999",
    "https://*",
    "https://*.",
    "https://a.*.example",
    "https://*example.com",
    "*.example.com",
    "https://app.example:*",
    "https://user@app.example",
    "https://app.example?x",
]


@pytest.mark.parametrize("given_", TAKEN)
def test_what_browsers_send_is_taken(given_: str) -> None:
    assert read_origin(given_) == TAKEN[given_]
    assert load({"cors_origins": given_}).cors_origins == (TAKEN[given_],)


@pytest.mark.parametrize("given_", REFUSED)
def test_what_would_never_match_is_refused_at_start(given_: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        load({"cors_origins": given_})


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(LABEL, min_size=1, max_size=3),
    st.sampled_from(["https://{}.example.com", "HTTPS://{}.Example.com"]),
)
def test_a_wildcard_is_for_subdomains(labels: list[str], spelling: str) -> None:
    assert Origins([read_origin("https://*.example.com")]).allow(spelling.format(".".join(labels)))


@pytest.mark.parametrize(
    "origin",
    [
        "https://example.com",
        "https://.example.com",
        "https://a..example.com",
        "http://a.example.com",
        "https://a.example.com:8443",
        "https://a.example.com.evil.org",
        "https://evil.org/.example.com",
        "https://evil.org#.example.com",
        "https://aexample.com",
        "null",
        "",
    ],
)
def test_and_for_nothing_else(origin: str) -> None:
    assert not Origins([read_origin("https://*.example.com")]).allow(origin)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(set(TAKEN.values()) - {"*", "https://*.example.com"})), st.text(max_size=5))
def test_the_others_match_exactly(origin: str, more: str) -> None:
    origins = Origins([origin])
    assert origins.allow(origin) and (not more or not origins.allow(origin + more))
