"""Owns reading `data:` URLs as browsers do: the gateway splits them, the picture process unpacks the rest.

The rules are those of the Fetch and URL standards: any letter case, white space anywhere, percent-encoding,
parameters, padding or none, a fragment. No state.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final, NamedTuple

EXPECTED: Final = "expected a data URL: data:image/png;base64,…"
_AROUND: Final = "".join(map(chr, range(0x21)))  # what the URL standard cuts off at both ends
_MAX_HEADER: Final = 2048
_REMOTE: Final = re.compile(r"[\0- ]*(?:https?|file|ftp|blob|s3|gs):", re.IGNORECASE)
_SPACE: Final = b"\t\n\f\r "
_SPACE_ESCAPES: Final = ("%0", "%20")  # of tab, line breaks and space; what else begins so is not base64
_STRANGE: Final = re.compile(rb"[^A-Za-z0-9+/]")
_MAX_BARE: Final = 1000
_BARE_PERCENT: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class NotADataUrl(ValueError):
    """The message says what is wrong and what is accepted."""


class Split(NamedTuple):
    """`media_type` is in lower case and may be empty; the body begins at `begin` and is still encoded."""

    media_type: str
    is_base64: bool
    begin: int


def split(url: str) -> Split:
    """Find the parts of a data URL without touching its body. Raises `NotADataUrl`."""
    comma = url.find(",", 0, _MAX_HEADER)
    header = re.sub(r"[\t\n\r]", "", url[: max(comma, 0)]).lstrip(_AROUND)
    if comma < 0 or header[:5].lower() != "data:":
        if _REMOTE.match(url[:100]):
            raise NotADataUrl(
                "pictures are not fetched from URLs; send the file itself: data:image/png;base64,…"
            )
        raise NotADataUrl(EXPECTED)
    media_type, *parameters = (part.strip().lower() for part in header[5:].split(";"))
    return Split(media_type, "base64" in parameters, comma + 1)


def decoded_bytes(url: str, parts: Split) -> int:
    """How long the file is that the body holds: up to two bytes less, and less still where a % escapes nothing.

    Never more, but for white space at the end of a body that is not base64: what is refused by it is too long.
    """
    end = url.find("#", parts.begin)
    end = len(url) if end < 0 else end
    num_escapes = url.count("%", parts.begin, end)
    dropped = _SPACE.decode() if parts.is_base64 else "\t\n\r"
    num_chars = (
        end - parts.begin - 2 * num_escapes - sum(url.count(char, parts.begin, end) for char in dropped)
    )
    if not parts.is_base64:
        return num_chars
    if num_escapes:
        num_chars -= sum(url.count(escape, parts.begin, end) for escape in _SPACE_ESCAPES)
    return num_chars * 3 // 4 - 2


def unpack(body: bytes, *, is_base64: bool) -> bytes:
    """The file in a data URL's body. Raises `NotADataUrl`."""
    body = body.partition(b"#")[0]
    if not is_base64:
        return _unescape(body.translate(None, b"\t\n\r").rstrip(_AROUND.encode()))
    if b"%" in body:
        body = _unescape(body)
    body = body.translate(None, _SPACE).rstrip(b"\0")
    bare = body.rstrip(b"=")
    if len(body) - len(bare) > 2:
        raise NotADataUrl("the data URL is not base64: more than two = at its end")
    if len(bare) % 4 == 1:
        raise NotADataUrl(
            f"the data URL is not base64: {len(bare)} characters, one more than whole groups of four"
        )
    if b"-" in bare or b"_" in bare:  # the alphabet for file names; no text is right in both
        bare = bare.translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except ValueError:
        strange = _STRANGE.search(bare)
        where = f": {chr(strange[0][0])!a} at character {strange.start()}" if strange else ""
        raise NotADataUrl(f"the data URL is not base64{where}") from None


def _unescape(body: bytes) -> bytes:
    """Undo percent-encoding, at the speed of the library's reader of `=XX`: a picture may be all escapes."""
    body, num_bare = _BARE_PERCENT.subn(b"%25", body, _MAX_BARE)  # one that escapes nothing stands for itself
    if num_bare == _MAX_BARE:
        raise NotADataUrl("the data URL is not percent-encoded: many % in it are not followed by two digits")
    return binascii.a2b_qp(body.replace(b"=", b"=3D").replace(b"%", b"="))
