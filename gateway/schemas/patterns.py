r"""Owns rewriting a schema's `pattern` into the syntax llguidance reads, without losing its meaning on the way. Pure.

JSON Schema's patterns are ECMAScript's, and validators run them by the engine of their own language. Where engines
disagree (`\d`, `.`, `\W` over all of Unicode), the narrow reading allows only texts that all of them accept, the wide
one allows what any of them does. NUL, which no answer spells, is left out: with it llguidance lets `\"` and `\\` in.
"""

from __future__ import annotations

import re
from typing import Final

from shared.grammars import GrammarError

_HEX: Final = re.compile(r"[0-9A-Fa-f]+")
_COUNT: Final = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")
_CONTROLS: Final = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_SPACE: Final = r"\t\n\x0b\x0c\r\x20"
_ALL_SPACE: Final = r"\s\x1c-\x1f\x85\u{feff}"  # what ECMAScript, Python or Rust take for white space
_LINE_ENDS: Final = r"\n\r\x85\u{2028}\u{2029}"
_NARROW: Final = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": _SPACE,
}
_WIDE: Final = {"d": r"\p{Nd}", "w": r"\p{L}\p{N}\p{M}_\p{Pc}\p{Join_Control}", "s": _ALL_SPACE}
_PROPERTY: Final = re.compile(r"\{\^?[A-Za-z_]+(?:=[A-Za-z_]+)?\}")


def translate(pattern: str, *, wide: bool = False) -> str:
    """The pattern in Rust's syntax. Raises `GrammarError` for what no automaton can keep (look-arounds, references)."""
    return _Translator(pattern, wide).run()


class _Translator:
    def __init__(self, pattern: str, wide: bool) -> None:
        self.pattern = pattern
        self.wide = wide
        self.at = 0
        self.out: list[str] = []

    def refuse(self, why: str) -> GrammarError:
        return GrammarError(f"the pattern {self.pattern[:80]!r} {why}")

    def run(self) -> str:
        pattern = self.pattern
        if pattern.startswith(
            "(?i)"
        ):  # no flag of ECMAScript's patterns, but of those people write for Python
            self.at = 4
            self.out.append("(?i)")
        while self.at < len(pattern):
            char = pattern[self.at]
            self.at += 1
            if char == "\\":
                code = self.code_or_class(wide=self.wide)
                self.out.append(self.quoted(code) if isinstance(code, int) else f"[{code}]")
            elif char == "[":
                self.out.append(self.set())
            elif char == ".":
                self.out.append(r"[^\x00]" if self.wide else rf"[^\x00{_LINE_ENDS}]")
            elif char == "(":
                self.out.append(self.group())
            elif char == "{":
                self.out.append(self.braces())
            elif char in "^$|)*+?":
                self.out.append(char)
            else:
                self.out.append(self.quoted(ord(char)))
        return "".join(self.out)

    def quoted(self, code: int) -> str:
        if code == 0:
            raise self.refuse("asks for NUL")
        return _quoted(code)

    def group(self) -> str:
        pattern, at = self.pattern, self.at
        if pattern[at : at + 1] != "?":
            return "(?:"
        if pattern[at : at + 2] == "?:":
            self.at += 2
            return "(?:"
        named = re.compile(r"\?P?<([A-Za-z_]\w*)>").match(pattern, at)
        if named is not None:
            self.at = named.end()
            return "(?:"
        if pattern[at : at + 2] in ("?=", "?!") or pattern[at : at + 3] in ("?<=", "?<!"):
            raise self.refuse("looks ahead or behind, which no automaton can keep")
        raise self.refuse("has a group of a kind that JSON Schema's patterns do not have")

    def braces(self) -> str:
        count = _COUNT.match(self.pattern, self.at - 1)
        before = self.out[-1] if self.out else ""
        if count is None or before in ("", "(?:", "|"):
            return r"\{"  # as ECMAScript reads a brace that begins no count
        self.at = count.end()
        return count.group()

    def code_or_class(self, *, wide: bool, in_set: bool = False) -> int | str:
        """Behind a backslash: a code point, or the inside of a set."""
        pattern = self.pattern
        if self.at >= len(pattern):
            raise self.refuse("ends in a backslash")
        char = pattern[self.at]
        self.at += 1
        if char in "dws":
            return (_WIDE if wide else _NARROW)[char]
        if char in "DWS":  # outside the class in every reading, or in any
            inside = "^" + (_NARROW if wide else _WIDE)[char.lower()] + r"\x00"
            return f"[{inside}]" if in_set else inside
        if char in "pP":
            found = _PROPERTY.match(pattern, self.at)
            if found is None:
                raise self.refuse(f"has \\{char} without a property")
            self.at = found.end()
            inside = f"\\{char}{found.group()}&&[^\\x00]"
            return f"[{inside}]" if in_set else inside
        if char == "b" and in_set:
            return 8
        if char in "bB":
            raise self.refuse("asks for the edge of a word, which no automaton here can keep")
        if char in "AZz":
            raise self.refuse(f"has \\{char}; JSON Schema's patterns have ^ and $")
        if char in _CONTROLS:
            if char == "0" and pattern[self.at : self.at + 1].isdigit():
                raise self.refuse("has an octal escape")
            return _CONTROLS[char]
        if char.isdigit() or (char == "k" and pattern[self.at : self.at + 1] == "<"):
            raise self.refuse("refers back to a group, which no automaton can keep")
        if char == "c":
            letter = pattern[self.at : self.at + 1]
            if not (letter.isascii() and letter.isalpha()):
                raise self.refuse("has \\c without a letter")
            self.at += 1
            return ord(letter) % 32
        if char == "x":
            return self.hex(2)
        if char == "u":
            return self.unicode()
        if char.isascii() and char.isalnum():
            raise self.refuse(f"has \\{char}, which means nothing")
        return ord(char)

    def hex(self, size: int) -> int:
        digits = self.pattern[self.at : self.at + size]
        if len(digits) != size or _HEX.fullmatch(digits) is None:
            raise self.refuse("has an escape that cannot be read")
        self.at += size
        return int(digits, 16)

    def unicode(self) -> int:
        pattern = self.pattern
        if pattern[self.at : self.at + 1] == "{":
            end = pattern.find("}", self.at)
            digits = pattern[self.at + 1 : end] if end > 0 else ""
            if _HEX.fullmatch(digits) is None or len(digits) > 6 or int(digits, 16) > 0x10FFFF:
                raise self.refuse("has an escape that cannot be read")
            self.at = end + 1
            code = int(digits, 16)
        else:
            code = self.hex(4)
            if 0xD800 <= code < 0xDC00 and pattern[self.at : self.at + 2] == "\\u":
                self.at += 2
                low = self.hex(4)
                if 0xDC00 <= low < 0xE000:
                    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
        if 0xD800 <= code < 0xE000:
            raise self.refuse("has half a surrogate pair")
        return code

    def set(self) -> str:
        """A set, from behind its opening bracket, with everything escaped that means more in Rust's sets."""
        pattern = self.pattern
        negated = pattern[self.at : self.at + 1] == "^"
        self.at += negated
        wide = self.wide != negated  # what is left of everything is narrow where what is taken away is wide
        parts: list[str] = []
        if pattern[self.at : self.at + 1] == "]":  # ECMAScript: an empty set; Python: a literal bracket
            raise self.refuse("has an empty set")
        while True:
            if self.at >= len(pattern):
                raise self.refuse("has a set without an end")
            if pattern[self.at] == "]":
                self.at += 1
                break
            low = self.member(wide)
            high: int | str = low
            if pattern[self.at : self.at + 1] == "-" and pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                dash = self.at
                self.at += 1
                high = self.member(wide)
                if isinstance(low, str) or isinstance(high, str):
                    self.at, high = dash, low  # a dash beside a class stands for itself
            if isinstance(low, str) or isinstance(high, str):
                parts.append(str(low))
                continue
            if high < low:
                raise self.refuse("has a range upside down")
            if not negated:
                low = max(low, 1)
            if low <= high:
                parts.append(_quoted(low) if low == high else f"{_quoted(low)}-{_quoted(high)}")
        if not parts:
            raise self.refuse("asks for NUL")
        inside = "".join(parts)
        if not negated:
            return f"[{inside}]"
        return rf"[^\x00{inside}]"

    def member(self, wide: bool) -> int | str:
        char = self.pattern[self.at]
        self.at += 1
        return self.code_or_class(wide=wide, in_set=True) if char == "\\" else ord(char)


def _quoted(code: int) -> str:
    char = chr(code)
    if char.isascii() and (char.isalnum() or char == "_"):
        return char
    return f"\\u{{{code:x}}}"
