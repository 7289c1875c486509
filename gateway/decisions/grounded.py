"""Owns reading a thought that points: its text, and the places in the picture that pieces of it speak of. Pure; gateway's loop.

Between two marks stand the text and the coordinates of one piece, x and y in turn; Moondream's code (`moondream.py`,
`_generate_reasoning`) cuts them so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.generation import ThoughtPart


class Detokenizer(Protocol):
    """As `stream.Detokenizer`."""

    def step(self, token_id: int) -> str:
        """The text this token settles."""

    def flush(self) -> str:
        """What is still held back."""


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """The ids that a thought is read by; behind `closing` come `num_opening` ids that open the answer."""

    coordinate: int
    closing: int
    num_opening: int
    cuts: Sequence[int]  # begin or end a piece


class GroundedThought:
    """One sequence's thought so far."""

    __slots__ = ("_detokenizer", "_left", "_marks", "_x", "is_over")

    def __init__(self, detokenizer: Detokenizer, marks: ThoughtMarks) -> None:
        self._detokenizer = detokenizer
        self._marks = marks
        self._x: float | None = None
        self._left = -1  # ids of the answer's opener that are to come; -1: the thought goes on
        self.is_over = False

    def take(self, token_id: int, value: float | None) -> ThoughtPart | None:
        """The next token, and its coordinate if it is one. Sets `is_over` with the last id in front of the answer."""
        marks = self._marks
        if self._left >= 0:
            self._left -= 1
            self.is_over = self._left <= 0
            return None
        if token_id == marks.closing:
            self._left = marks.num_opening
            self.is_over = not self._left
            return self.close()
        if token_id in marks.cuts:
            return self.close()
        if token_id == marks.coordinate:
            x, self._x = self._x, None
            if x is not None:
                return ThoughtPart(point=(x, value or 0.0))
            self._x = value or 0.0
            return None
        text = self._detokenizer.step(token_id)
        return ThoughtPart(text) if text else None

    def close(self) -> ThoughtPart:
        """The end of a piece, with what was held back of its text."""
        self._x = None
        return ThoughtPart(self._detokenizer.flush(), closes=True)


def reasoning_object(parts: Iterable[ThoughtPart]) -> dict[str, Any]:
    """The text, and for each piece that points its characters [start_idx, end_idx) and its points."""
    text, start = "", 0
    points: list[list[float]] = []
    grounding = []
    for part in (*parts, ThoughtPart(closes=True)):
        text += part.text
        if part.point is not None:
            points.append(list(part.point))
        if part.closes:
            if points:
                grounding.append({"start_idx": start, "end_idx": len(text), "points": points})
            start, points = len(text), []
    return {"text": text, "grounding": grounding}
