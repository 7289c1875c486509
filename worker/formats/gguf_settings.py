"""Owns reading one architecture's settings out of GGUF metadata, each checked for its type. Any thread."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from worker.formats.errors import CheckpointError
from worker.formats.gguf_container import Container


class Settings:
    """The settings `<architecture>.<name>` of one file. Raises CheckpointError naming the setting at fault."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.architecture = str(container.metadata.get("general.architecture", ""))

    def count(self, name: str, default: int | None = None, *, skip_zeros: bool = False) -> int:
        """A whole number of at least 1; per-layer lists count where all layers agree, but those with 0 if they are skipped."""
        value = self._get(name)
        if skip_zeros and isinstance(value, np.ndarray):
            value = value[value != 0]
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
            if (value != value[0]).any():
                raise self.error(name, f"differs between layers ({value.min()} … {value.max()})")
            value = int(value[0])
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise self.error(
                name, f"is {value!r}; expected a whole number of at least 1", missing=value is None
            )
        return value

    def counts(self, name: str, length: int) -> list[int]:
        """A whole number of at least 0 for each of so many layers, from a list or from the one number of all."""
        value = self._get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return [value] * length
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.shape != (length,):
            raise self.error(name, f"is no list of {length} whole numbers", missing=value is None)
        return [int(one) for one in value]

    def maybe_count(self, name: str) -> int | None:
        """As `count`, but None where the file has no such setting, or 0."""
        return self.count(name) if self._get(name) not in (None, 0) else None

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, f"is {value!r}; expected a finite number", missing=value is None)
        return float(value)

    def maybe_number(self, name: str) -> float | None:
        """As `number`, but None where the file has no such setting."""
        return None if self._get(name) is None else self.number(name)

    def text(self, name: str) -> str:
        """A string; empty where the file has no such setting."""
        value = self._get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(name, f"is {value!r}; expected a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name)
        return default if value is None else bool(value)

    def has(self, tensor: str) -> bool:
        """Whether the file holds that tensor."""
        return tensor in self.container.tensors

    def error(self, name: str, problem: str, *, missing: bool = False) -> CheckpointError:
        """What is wrong with a setting, ready to raise."""
        key = f"{self.architecture}.{name}"
        return CheckpointError(
            f"the setting {key!r} is missing" if missing else f"the setting {key!r} {problem}",
            file=self.container.path,
        )

    def _get(self, name: str) -> Any:
        return self.container.metadata.get(f"{self.architecture}.{name}")
