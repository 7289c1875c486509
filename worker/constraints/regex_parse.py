r"""Owns reading a bounded subset of regular expressions into trees over bytes. Pure; compiler threads.

Covered: literals, escapes, `.`, sets and their negations, groups without flags, `|`, `* + ? {m,n}` lazy or not,
anchors at the two ends. Matching is of the whole text, in UTF-8. What is not covered raises `Unsupported`, and
llguidance takes the pattern instead. The pattern has been through `shared.grammars.ascii_classes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class Unsupported(Exception):
    """Outside the subset, or too large for an automaton."""


@dataclass(frozen=True, slots=True)
class Byte:
    """One byte out of a set: bit b of `mask`."""

    mask: int


@dataclass(frozen=True, slots=True)
class Cat:
    """Parts one after the other; without parts, the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of the parts; without parts, no text matches."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part repeated `low` to `high` times; None: without bound."""

    part: Node
    low: int
    high: int | None


Node = Byte | Cat | Alt | Repeat
Ranges = list[tuple[int, int]]

EMPTY = Cat(())
LAST = 0x10FFFF
_ESCAPES = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7}
_LITERAL_ESCAPES = frozenset("\\.+*?()|[]{}^$/-#&~'\" !%,:;<=>@`")
MAX_NESTING = 100


def literal(text: str) -> Node:
    """Exactly this text."""
    return Cat(tuple(Byte(1 << byte) for byte in text.encode()))


def char_set(ranges: Ranges, *, negated: bool = False) -> Node:
    """One code point within (or outside) these inclusive ranges, as UTF-8."""
    merged: Ranges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    if negated:
        starts = [0, *(high + 1 for _, high in merged)]
        ends = [*(low - 1 for low, _ in merged), LAST]
        merged = [(low, high) for low, high in zip(starts, ends, strict=True) if low <= high]
    mask = 0
    longer: list[Node] = []
    for low, high in merged:
        for sequence in _utf8(low, high):
            if len(sequence) == 1:
                mask |= _span(*sequence[0])
            else:
                longer.append(Cat(tuple(Byte(_span(*pair)) for pair in sequence)))
    parts: list[Node] = [Byte(mask)] if mask else []
    parts += longer
    return parts[0] if len(parts) == 1 else Alt(tuple(parts))


def _span(low: int, high: int) -> int:
    return (1 << (high + 1)) - (1 << low)


def _utf8(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """The range of code points as products of byte ranges."""
    for edge in (0x7F, 0x7FF, 0xFFFF):
        if low <= edge < high:
            yield from _utf8(low, edge)
            yield from _utf8(edge + 1, high)
            return
    if low <= 0xDFFF and high >= 0xD800:  # surrogates have no UTF-8
        if low < 0xD800:
            yield from _utf8(low, 0xD7FF)
        if high > 0xDFFF:
            yield from _utf8(0xE000, high)
        return
    for bits in (6, 12, 18):
        below = (1 << bits) - 1
        if high > 0x7F and low & ~below != high & ~below:
            if low & below:
                yield from _utf8(low, low | below)
                yield from _utf8((low | below) + 1, high)
                return
            if high & below != below:
                yield from _utf8(low, (high & ~below) - 1)
                yield from _utf8(high & ~below, high)
                return
    yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))


def parse(pattern: str) -> Node:
    """The pattern's tree. Raises `Unsupported`."""
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and not pattern.endswith("\\$"):
        pattern = pattern[:-1]
    reader = _Reader(pattern)
    node = reader.alternation(0)
    if reader.at < len(pattern):
        raise Unsupported("unbalanced )")
    return node


class _Reader:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        char = self.peek()
        if not char:
            raise Unsupported("the pattern ends too early")
        self.at += 1
        return char

    def alternation(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise Unsupported("nested too deeply")
        branches = [self.sequence(depth)]
        while self.peek() == "|":
            self.at += 1
            branches.append(self.sequence(depth))
        return branches[0] if len(branches) == 1 else Alt(tuple(branches))

    def sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while (char := self.peek()) and char not in "|)":
            parts.append(self.repeat(self.atom(depth)))
        return parts[0] if len(parts) == 1 else Cat(tuple(parts))

    def repeat(self, node: Node) -> Node:
        while (char := self.peek()) and char in "*+?{":
            self.at += 1
            if char == "{":
                low, high = self.counts()
            else:
                low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
            node = Repeat(node, low, high)
            if self.peek() == "?":  # lazy: the same texts match
                self.at += 1
        return node

    def counts(self) -> tuple[int, int | None]:
        end = self.pattern.find("}", self.at)
        low, comma, high = self.pattern[self.at : end].partition(",")
        if end < 0 or not low.isdecimal() or not (high.isdecimal() or not high) or len(low + high) > 8:
            raise Unsupported("a repeat that cannot be read")
        self.at = end + 1
        bounds = int(low), (int(high) if high else None) if comma else int(low)
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise Unsupported("a repeat upside down")
        return bounds

    def atom(self, depth: int) -> Node:
        char = self.take()
        if char == "(":
            if self.peek() == "?":
                if self.pattern[self.at : self.at + 2] != "?:":
                    raise Unsupported("a group with flags, a name or a look-around")
                self.at += 2
            node = self.alternation(depth + 1)
            if self.take() != ")":
                raise Unsupported("unbalanced (")
            return node
        if char == "[":
            return self.set()
        if char == ".":
            return char_set([(10, 10)], negated=True)
        if char == "\\":
            return char_set([(self.escape(),) * 2])
        if char in "^$*+?{":
            raise Unsupported(f"{char} in this place")
        return char_set([(ord(char),) * 2])

    def escape(self) -> int:
        char = self.take()
        if char in _ESCAPES:
            return _ESCAPES[char]
        if char in "xu":
            size = 2 if char == "x" else 4
            digits = self.pattern[self.at : self.at + size]
            self.at += size
            try:
                code = int(digits, 16) if len(digits) == size and digits.isalnum() else -1
            except ValueError:
                code = -1
            if code < 0 or 0xD800 <= code <= 0xDFFF:
                raise Unsupported("an escape that cannot be read")
            return code
        if char not in _LITERAL_ESCAPES:
            raise Unsupported(f"\\{char}")
        return ord(char)

    def set(self) -> Node:
        negated = self.peek() == "^"
        self.at += negated
        ranges: Ranges = []
        first = True
        while first or self.peek() != "]":
            first = False
            low = self.member()
            high = low
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.member()
            if high < low:
                raise Unsupported("a range upside down")
            ranges.append((low, high))
        self.at += 1
        return char_set(ranges, negated=negated)

    def member(self) -> int:
        char = self.take()
        if char == "\\":
            return self.escape()
        if char == "[" or (char in "&~-" and self.peek() == char):
            raise Unsupported("nested sets and set operations")
        return ord(char)
