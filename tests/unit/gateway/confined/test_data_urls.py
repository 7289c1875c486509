"""Data URLs: every spelling that browsers take comes to the same file; what is none says why."""

from __future__ import annotations

import base64
import random
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.confined.data_urls import NotADataUrl, decoded_bytes, split, unpack

SPACES = ("\n", "\r\n", " ", "\t", "%0A", "%0d%0a", "%20", "%09")


def read(url: str) -> bytes:
    parts = split(url)
    return unpack(url[parts.begin :].encode(), is_base64=parts.is_base64)


def cased(text: str, rng: random.Random) -> str:
    return "".join(rng.choice((letter.upper(), letter.lower())) for letter in text)


@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_every_legal_spelling_of_base64_is_the_same_file(data: bytes, seed: int) -> None:
    rng = random.Random(seed)
    body = base64.b64encode(data).decode()
    if rng.random() < 0.3:
        body = body.rstrip("=")
    if rng.random() < 0.2:
        body = body.replace("+", "-").replace("/", "_")
    if rng.random() < 0.5:
        body = "".join(f"%{ord(char):02x}" if rng.random() < 0.2 else char for char in body)
    if rng.random() < 0.6 and "%" not in body:
        width = rng.choice((4, 64, 76))
        body = rng.choice(SPACES).join(
            body[at : at + width] for at in range(0, len(body), width)
        ) + rng.choice(SPACES)
    parameters = rng.sample(
        [";charset=utf-8", ";name=a.png", '; foo="bar"', ";", ";x=%20y"], rng.randint(0, 3)
    )
    media_type = rng.choice(
        ["image/png", "image/jpeg", "", "application/octet-stream", "text/plain", "image/x-é"]
    )
    marker = rng.choice([";base64", "; base64", ";base64 ", ";\tbase64"])
    around = rng.choice(["", " ", "\n"])
    url = (
        around
        + cased("data:", rng)
        + cased(media_type, rng)
        + "".join(parameters)
        + cased(marker, rng)
        + ","
        + body
    )
    url += rng.choice(["", "#fragment", around])
    assert read(url) == data
    assert len(data) - 2 <= decoded_bytes(url, split(url)) <= len(data)


@pytest.mark.parametrize("space", [*SPACES, "\f", "%0c", "%0C", "%0D%0A"])
def test_line_breaks_are_no_part_of_the_length(space: str) -> None:
    """Escaped ones were counted: a picture below the limit was refused when its lines were short."""
    data = bytes(range(240))
    body = base64.b64encode(data).decode()
    url = "data:;base64," + space.join(body[at : at + 4] for at in range(0, len(body), 4))
    assert read(url) == data
    assert decoded_bytes(url, split(url)) == len(data) - 2
    if space in ("\n", "\r\n", "\t"):
        assert decoded_bytes(f"data:,a{space}b", split("data:,")) == 2


@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_a_body_may_be_percent_encoded_instead(data: bytes, seed: int) -> None:
    rng = random.Random(seed)
    plain = frozenset(b"ABCdef0123456789-_.~!*'();:@&=+$,/?[]")
    body = "".join(chr(byte) if byte in plain and rng.random() < 0.8 else f"%{byte:02X}" for byte in data)
    url = f"data:image/png,{body}"
    assert read(url) == data
    assert decoded_bytes(url, split(url)) <= len(data)


@pytest.mark.parametrize(
    "text",
    [b"100%", b"%", b"%%41", b"%4", b"%zz", b"a=b", b"=41", b"=\n", b"%3d%0a", b"\xff%80", b"%25%", b"x_y  "],
)
def test_percent_signs_that_escape_nothing_stand_for_themselves(text: bytes) -> None:
    want = unquote_to_bytes(text).translate(None, b"\n" if b"\n" in text else b"").rstrip(b" ")
    assert unpack(text, is_base64=False) == want


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("", "expected a data URL"),
        ("picture.png", "expected a data URL"),
        ("data:image/png;base64", "expected a data URL"),
        ("iVBORw0KGgo=", "expected a data URL"),
        ("HTTPS://example.com/a,b.png", "not fetched"),
        (" file:///etc/passwd", "not fetched"),
        ("blob:https://example.com/1", "not fetched"),
        ("data:image/png;base64,AAAA====", "more than two ="),
        ("data:image/png;base64,AAAAA", "5 characters, one more than whole groups of four"),
        ("data:image/png;base64,AA@A", "'@' at character 2"),
        ("data:image/png;base64,AA=A", "'=' at character 2"),
        ("data:image/png;base64,AAé", "not base64"),
        ("data:" + "x" * 5000 + ";base64,AAAA", "expected a data URL"),
    ],
)
def test_what_is_no_data_url_says_why(url: str, word: str) -> None:
    with pytest.raises(NotADataUrl, match=word):
        read(url)
