"""Owns reading an outline as it is decoded: the box of what was named, then the commands of an SVG path within it. Pure; gateway's
loop.

As Moondream's makers read it (kestrel, `skills/segment.py` and `utils/svg.py`): first x and y of the box's centre and its size, by
value; then every token is, by itself, a command's letter, a number, or the minus of the number behind it. Numbers are of a square
of 960 that is laid over the box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.generation import Delta, SpatialObject

SIDE: Final = 960.0
DECIMALS: Final = 3
NUMBERS: Final = {"Z": 0, "H": 1, "V": 1, "M": 2, "L": 2, "T": 2, "S": 4, "Q": 4, "C": 6}
"""How many numbers a command takes at a time. Arcs are not among them: their flags are no places."""


@dataclass(frozen=True, slots=True)
class OutlineMarks:
    """The ids that an outline is read by, and the text of the others; "" for those that are none of the answer."""

    coordinate: int
    size: int
    text: Callable[[int], str]


class Outline:
    """One sequence's outline so far. What cannot be read ends the path: it is whole commands up to there."""

    __slots__ = (
        "_command",
        "_coordinates",
        "_has_box",
        "_is_begun",
        "_is_over",
        "_marks",
        "_negative",
        "_numbers",
    )

    def __init__(self, marks: OutlineMarks) -> None:
        self._marks = marks
        self._coordinates: list[float] = []
        self._numbers: list[str] = []
        self._command = ""
        self._negative = self._has_box = self._is_begun = self._is_over = False

    def take(self, token_id: int, values: Sequence[float] | None, index: int) -> Delta | SpatialObject | None:
        """Token number `index`, and its values if it is a coordinate or a size: the box once it is known, and each command with
        its numbers. The texts joined are the path."""
        marks = self._marks
        if token_id in (marks.coordinate, marks.size):
            return self._place(token_id == marks.size, values or ())
        text = marks.text(token_id).strip()
        if not text or self._is_over:
            return None
        piece = self._read(text)
        if not piece:
            return None
        piece = f" {piece}" if self._is_begun else piece
        self._is_begun = True
        return Delta(piece, (token_id,), index)

    def _place(self, is_size: bool, values: Sequence[float]) -> SpatialObject | None:
        if self._has_box or not values:
            return None
        if not is_size:
            self._coordinates.append(_clamp(values[0]))
            return None
        if len(self._coordinates) < 2:
            return None
        self._has_box = True
        x, y = self._coordinates[:2]
        return SpatialObject(x, y, _clamp(values[0]), _clamp(values[-1]))

    def _read(self, text: str) -> str:
        """The next token: a command with all its numbers, where that completes one."""
        if text.upper() in NUMBERS:
            if self._numbers or self._negative or (not self._is_begun and text not in ("M", "m")):
                self._is_over = True
                return ""
            self._command = text
            return "" if NUMBERS[text.upper()] else text
        if text == "-" and not self._negative:
            self._negative = True
            return ""
        wanted = NUMBERS.get(self._command.upper(), 0)
        if not wanted or not (text.isascii() and text.isdigit()):
            self._is_over = True
            return ""
        self._numbers.append(_scaled(text, self._negative))
        self._negative = False
        if len(self._numbers) < wanted:
            return ""
        piece = " ".join((self._command, *self._numbers))
        self._numbers.clear()
        # Further numbers go on with the same command; behind a move they are lines.
        self._command = {"M": "L", "m": "l"}.get(self._command, self._command)
        return piece


def _scaled(digits: str, negative: bool) -> str:
    """A number of the square in parts of its side, to so many decimals, without zeros at its end."""
    value = round(int(digits[:9]) / SIDE, DECIMALS)
    shown = f"{value:.{DECIMALS}f}".rstrip("0").rstrip(".")
    return f"-{shown}" if negative and value else shown


def _clamp(value: float) -> float:
    """Into [0, 1]; NaN becomes 0."""
    return min(1.0, value) if value > 0.0 else 0.0
