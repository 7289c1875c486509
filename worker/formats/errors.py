"""Owns the error of a checkpoint that cannot be served. Imports nothing, so that it costs nothing. Any thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that cannot be served, and where the fault lies. Fields not known are None."""

    def __init__(
        self,
        problem: str,
        *,
        file: Path | None = None,
        tensor: str | None = None,
        expected: Sequence[int] | None = None,
        found: Sequence[int] | None = None,
    ) -> None:
        self.problem, self.file, self.tensor = problem, file, tensor
        self.expected = None if expected is None else tuple(expected)
        self.found = None if found is None else tuple(found)
        place = ", ".join(str(part) for part in (file, tensor) if part is not None)
        text = f"{place}: {problem}" if place else problem
        if self.expected is not None:
            text += f", expected {self.expected}" + (
                f", found {self.found}" if self.found is not None else ""
            )
        super().__init__(text)
