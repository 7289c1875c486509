"""Owns telling a template's special tokens from the same words in a user's text. Runs on the template thread and the loop.

Users' texts go through the template with each special token's name replaced by a random stand-in; special tokens in
the rendered text then come from the template. Stand-ins are letters and digits, so that no filter changes them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

_NONCE: Final = f"zq{secrets.token_hex(12)}"


class SpecialText:
    """The special tokens' names of one tokenizer."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = sorted((name for name in names if name), key=len, reverse=True)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        listed = "|".join(map(re.escape, self.names))
        self._find = re.compile(listed).sub if self.names else None
        self._beginnings = {name[:end] for name in self.names for end in range(1, len(name))}
        self._firsts = {name[0] for name in self.names}
        self._longest = max(map(len, self._beginnings), default=0)
        self._stand_in = re.compile(_NONCE + r"([nc])(\d+)q")
        self._either = re.compile(f"{self._stand_in.pattern}|({listed})") if self.names else self._stand_in

    def protect(self, value: Any) -> Any:
        """A copy of plain data in which stand-ins replace names, and parts of names that a template could join to one."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101 - the second asks an abstract class
            return {key: self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """Rendered text with the names back in place of their stand-ins."""
        return self._stand_in.sub(self._restored, text) if _NONCE in text else text

    def has_stand_ins(self, text: str) -> bool:
        """Whether a rendered text has stand-ins: words of a user that look like special tokens."""
        return _NONCE in text

    def alias(self, name: str) -> str:
        """What `with_aliases` writes for the special token of this name."""
        return f"{_NONCE}t{self._numbers[name]}q"

    def with_aliases(self, text: str) -> str:
        """Rendered text in which the template's special tokens have their aliases, and the users' words their names."""
        return self._either.sub(
            lambda match: self.alias(match[3]) if match.lastindex == 3 else self._restored(match), text
        )

    def _restored(self, match: re.Match[str]) -> str:
        return self.names[int(match[2])] if match[1] == "n" else chr(int(match[2]))

    def _protect_text(self, text: str) -> str:
        if self._find is None:
            return text
        for first in self._firsts:  # nearly no text has even the first character of one
            if first in text:
                break
        else:
            return text
        text = self._find(lambda match: f"{_NONCE}n{self._numbers[match[0]]}q", text)
        # A name that was split over two strings would be whole again when a template joins them.
        body = text.rstrip()
        for size in range(min(self._longest, len(body)), 0, -1):
            if body[-size:] in self._beginnings:
                start = len(body) - size
                return f"{text[:start]}{_NONCE}c{ord(text[start])}q{text[start + 1 :]}"
        return text
