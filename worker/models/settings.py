"""Owns reading the settings of a model's config.json, each checked, errors naming the file and the field. Decode thread."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from worker.formats.source import CheckpointError

# Larger ones are nonsense that would be met only when memory is asked for.
_MOST = {"num_hidden_layers": 1024, "max_position_embeddings": 1 << 24, "vocab_size": 1 << 24}
_MOST_OTHERS = (1 << 31) - 1


class Settings:
    """A config.json, or an object within one. Every method raises CheckpointError; null counts as left out."""

    def __init__(self, values: dict[str, Any], file: Path) -> None:
        self.values = values
        self.file = file

    def get(self, name: str, default: Any = None) -> Any:
        """The value as the file has it."""
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1, and no larger than a model's can be."""
        value = self.get(name, default)
        if value is None:
            raise self.fault(f"{name!r} is missing; a whole number is expected")
        most = _MOST.get(name, _MOST_OTHERS)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.fault(f"{name!r} is {value!r}; a whole number from 1 to {most} is expected")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fault(f"{name!r} is neither true nor false")
        return value

    def above_0(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= sys.float_info.max
        ):
            found = "missing" if value is None else repr(value)[:80]
            raise self.fault(f"{name!r} is {found}; a number above 0 is expected")
        return float(value)

    def objects(self, name: str) -> dict[str, Any]:
        """An object; empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.fault(f"{name!r} is not an object")
        return value

    def listed(self, name: str, length: int) -> list[Any] | None:
        """A list with an entry a layer, the first `length` of it; None where there is none."""
        value = self.get(name)
        if value is None or value == []:
            return None
        if not isinstance(value, list) or len(value) < length:
            raise self.fault(f"{name!r} is not a list of {length} entries")
        return value[:length]

    def fault(self, problem: str) -> CheckpointError:
        """The error to raise about this file."""
        return CheckpointError(problem, file=self.file)
