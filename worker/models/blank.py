"""Owns building a model without its weights, to learn what it will hold: every tensor has a shape and no memory. Decode thread.

A family's own loader runs over tensors on torch's device `meta`, which have all but numbers. So whatever a family is made
of, also one that is written tomorrow, is counted as it will be built, from the headers of its files alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worker.formats.source import Packed, ProgressReport, Rename, Source, Target, Tensors
from worker.models.contract import Model
from worker.models.registry import load_model
from worker.native.quantised import KINDS
from worker.native.quantised_source import block_kind

META = torch.device("meta")


@dataclass(slots=True)
class Stored:
    """What was taken of a file: numbers of weights by how they are stored, of matrices and of everything."""

    matrices: dict[str, int] = field(default_factory=dict)
    largest: int = 0  # numbers of the largest tensor

    def count(self, kind: str, shape: tuple[int, ...]) -> None:
        """Count a tensor."""
        number = torch.Size(shape).numel()
        self.largest = max(self.largest, number)
        if len(shape) > 1:
            self.matrices[kind] = self.matrices.get(kind, 0) + number

    @property
    def share_bf16(self) -> float:
        """Of all numbers of float matrices, the share that was saved in bf16."""
        floats = sum(number for kind, number in self.matrices.items() if kind not in KINDS)
        return self.matrices.get("BF16", 0) / floats if floats else 0.0


class BlankSource:
    """`source` with tensors that hold nothing; a `source.Source`. `made`: what `quantize` says; `reads_blocks`: whether
    products take a file's blocks as they are."""

    def __init__(self, source: Source, made: str | None, *, reads_blocks: bool) -> None:
        self._source, self._made, self._reads_blocks = source, made, reads_blocks
        self.path: Path = source.path
        self.settings_file: Path = source.settings_file
        self.model_id, self.created, self.num_bytes = source.model_id, source.created, source.num_bytes
        self.config: dict[str, Any] = source.config
        self.generation, self.templates = source.generation, source.templates
        self.stored = Stored()

    def open(self, report: ProgressReport, rename: Rename = Target) -> BlankTensors:
        """See `Source.open`."""
        inner = self._source.open(nothing_told, rename)
        return BlankTensors(inner, self._made, self.stored, reads_blocks=self._reads_blocks)

    def tokenizer(self) -> bytes:
        """See `Source.tokenizer`."""
        return self._source.tokenizer()

    def end_tokens(self) -> list[int]:
        """See `Source.end_tokens`."""
        return self._source.end_tokens()

    def special_tokens(self) -> dict[str, str]:
        """See `Source.special_tokens`."""
        return self._source.special_tokens()


class BlankTensors:
    """Shapes of an open checkpoint's tensors; a `source.Tensors`."""

    def __init__(self, inner: Tensors, made: str | None, stored: Stored, *, reads_blocks: bool) -> None:
        self._inner, self._made, self._stored, self._reads_blocks = inner, made, stored, reads_blocks

    def __contains__(self, name: str) -> bool:
        return name in self._inner

    def take(self, name: str, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Tensors.take`."""
        self.skip(name, *shape)
        self._stored.count(self._inner.kind_of(name), shape)
        return torch.empty(shape, dtype=dtype, device=META)

    def take_packed(self, name: str, *shape: int) -> Packed | None:
        """See `Tensors.take_packed`."""
        if not self._reads_blocks or len(shape) != 2 or name not in self._inner:
            return None
        kind = self._inner.kind_of(name)
        if kind not in KINDS:
            made = None if self._made is None else block_kind(name, shape, self._made)
            if made is None:
                return None
            kind = made
        self.skip(name, *shape)
        self._stored.count(kind, shape)
        rows, columns = shape
        values, num_bytes, _ = KINDS[kind]
        return Packed(
            kind,
            (rows, columns),
            torch.empty(rows, columns // values * num_bytes, dtype=torch.uint8, device=META),
        )

    def skip(self, name: str, *shape: int) -> None:
        """See `Tensors.skip`."""
        self._inner.skip(name, *shape)

    def kind_of(self, name: str) -> str:
        """See `Tensors.kind_of`."""
        return self._inner.kind_of(name)

    def finish(self) -> None:
        """See `Tensors.finish`."""
        self._inner.finish()


def nothing_told(phase: str, done: float, total: float) -> None:
    """A `ProgressReport` that nobody reads."""


def blank_model(
    source: Source, dtype: torch.dtype, *, made: str | None, reads_blocks: bool
) -> tuple[Model, Stored]:
    """The model of `source` without its numbers, and how they are stored. Raises CheckpointError as loading would."""
    blank = BlankSource(source, made, reads_blocks=reads_blocks)
    with torch.inference_mode():
        model = load_model(blank, META, dtype, nothing_told)
    return model, blank.stored
