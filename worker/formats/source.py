"""Owns the seam between model families and file formats: a model as it lies on disk. Decode thread.

A family reads settings under the names that Hugging Face's config.json gives them, and takes tensors by those names
too, whatever the format; a format's reader translates. Nothing of a model that is on disk is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


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


class ProgressReport(Protocol):
    """Told how far a long start-up phase is; prints a bar where a person watches."""

    def __call__(self, phase: str, done: float, total: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a stored tensor is to the model: its canonical name, and whether it was stored transposed."""

    name: str
    transposed: bool = False


Rename = Callable[[str], Target | None]
"""Stored name → canonical name; None drops a tensor that the model computes itself."""


class Tensors(Protocol):
    """An open checkpoint's tensors. `take` hands out each once; `finish` refuses what nobody took."""

    def __contains__(self, name: str) -> bool: ...

    def take(self, name: str, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor of that canonical name, of this shape, as a copy on `device` in `dtype`.

        Raises CheckpointError when it is missing, of another shape, or not floating point.
        """
        ...

    def finish(self) -> None:
        """Let go of the files. Raises CheckpointError naming tensors that were never taken."""
        ...


class Source(Protocol):
    """A model on disk: its settings, its tensors, and what gateways need to speak its language."""

    path: Path  # the folder or file itself, named in errors
    settings_file: Path  # what an error about a setting names
    model_id: str  # what it is called unless its settings say otherwise
    created: int  # seconds since 1970
    num_bytes: int  # of its weights, as they lie there
    config: dict[str, Any]  # as config.json spells it
    generation: dict[str, Any]  # as generation_config.json spells it; empty where there is none

    def open(self, report: ProgressReport, rename: Rename = Target) -> Tensors:
        """Its tensors. Raises CheckpointError on anything but whole, consistent files."""
        ...

    def tokenizer(self) -> bytes:
        """tokenizer.json, read or made. Raises CheckpointError where there is none."""
        ...

    def chat_template(self) -> str:
        """The Jinja chat template; empty where there is none."""
        ...
