"""Owns keeping secrets out of what a process writes: known ones, and what looks like one. Any thread.

`shared.logs` sends every line through `redact`, whoever wrote it. The rule that call sites log ids, counts and codes
only comes first; this is the second line, for libraries and for what nobody thought of.
"""

from __future__ import annotations

import json
import re
from typing import Final

MASK: Final = "[hidden]"

# A scheme word or a name that secrets go by, then the secret up to white space or a mark that ends a value.
_VALUE: Final = r"[^\s,;\"'\\(){}\[\]<>]+"
_LOOKS_SECRET: Final = re.compile(
    r"(?P<before>openai-insecure-api-key\.|\bsk-degas-|\b(?:bearer|basic)\s+"
    r"|\b(?:authorization|proxy-authorization|x-moondream-auth|x-api-key|api[_-]?keys?|cookie|password|secret)"
    r"\\?[\"']?\s*[:=]\s*[\[({]*(?:b?\\?[\"'])?(?!(?:bearer|basic)\s))" + _VALUE,
    re.IGNORECASE,
)

_known: set[str] = set()
_known_pattern: re.Pattern[str] | None = None


def hide(*secrets: str) -> None:
    """Replace these texts in every later line of this process. Empty ones are left out."""
    global _known_pattern
    for secret in secrets:
        if secret:
            _known.update((secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]))
    longest_first = sorted(_known, key=len, reverse=True)
    _known_pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def redact(text: str) -> str:
    """`text` with every known secret, and whatever follows a word that announces one, replaced."""
    if _known_pattern is not None:
        text = _known_pattern.sub(MASK, text)
    return _LOOKS_SECRET.sub(rf"\g<before>{MASK}", text)
