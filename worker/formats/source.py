"""Owns the seam between model families and file formats: a model as it lies on disk. Decode thread.

A family reads settings under the names that Hugging Face's config.json gives them, and takes tensors by those names
too, whatever the format; a format's reader translates. Nothing of a model that is on disk is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from worker.formats.errors import CheckpointError as CheckpointError


class ProgressReport(Protocol):
    """Told how far a long start-up phase is; prints a bar where a person watches."""

    def __call__(self, phase: str, done: float, total: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a stored tensor is to the model: its canonical name, and whether it was stored transposed. `joined`: matrices of one
    size, stored as (number, rows, columns), are one matrix whose rows follow each other."""

    name: str
    transposed: bool = False
    joined: bool = False


Rename = Callable[[str], Target | None]
"""Stored name → canonical name; None drops a tensor that the model computes itself."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as its file packs it: ggml's blocks, a row's after one another, rows in Hugging Face's order."""

    type: (
        str  # ggml's name, such as Q4_K; `gguf_blocks` and `worker.native.quantised` know what its bytes mean
    )
    shape: tuple[int, int]  # rows, values of a row
    data: Tensor  # (rows, bytes of a row) uint8 on the CPU


class Tensors(Protocol):
    """An open checkpoint's tensors. `take` hands out each once; `finish` raises an error if a tensor was not taken."""

    def __contains__(self, name: str) -> bool: ...

    def take(self, name: str, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor of that canonical name, of this shape, as a copy on `device` in `dtype`.

        Raises CheckpointError when it is missing, of another shape, or not floating point.
        """
        ...

    def take_packed(self, name: str, *shape: int) -> Packed | None:
        """The tensor as it is stored, if it is a matrix in quantised blocks; otherwise None, and the tensor stays untaken.

        Raises CheckpointError when it is missing or of another shape.
        """
        ...

    def skip(self, name: str, *shape: int) -> None:
        """Count the tensor as taken without reading it. Raises CheckpointError when it is missing or of another shape."""
        ...

    def kind_of(self, name: str) -> str:
        """How the tensor of that canonical name is stored: BF16, F16, F32, …, or ggml's name of its blocks. Empty where
        it is missing. Reads nothing."""
        ...

    def finish(self) -> None:
        """Let go of the files. Raises CheckpointError naming tensors that were never taken."""
        ...


def slabs_of(tensors: Tensors, name: str, *shape: int) -> Iterator[Tensor]:
    """A float matrix (rows, columns) as slabs of some rows each, fp32, bf16 or fp16, in order, on the CPU; each valid until the
    next one is asked for. Where its format reads no slabs, the whole at once. The tensor stays untaken: `skip` it afterwards.

    Raises CheckpointError as `take`.
    """
    read = getattr(tensors, "slabs", None)
    found: Iterator[Tensor] | None = None if read is None else read(name, *shape)
    if found is None:
        found = iter([tensors.take(name, *shape, device=torch.device("cpu"), dtype=torch.float32)])
    return found


class Source(Protocol):
    """A model on disk: its settings, its tensors, and what gateways need to speak its language."""

    path: Path  # the folder or file itself, named in errors
    settings_file: Path  # what an error about a setting names
    model_id: str  # what it is called unless its settings say otherwise
    created: int  # seconds since 1970
    num_bytes: int  # of its weights on disk
    config: dict[str, Any]  # as config.json spells it
    generation: dict[str, Any]  # as generation_config.json spells it; empty where there is none
    templates: dict[
        str, str
    ]  # Jinja chat templates by name, the usual one as `default`; empty where there is none

    def open(self, report: ProgressReport, rename: Rename = Target) -> Tensors:
        """Its tensors. Raises CheckpointError on anything but whole, consistent files."""
        ...

    def tokenizer(self) -> bytes:
        """tokenizer.json, read or made, which the tokenizers library reads. Raises CheckpointError where there is
        none or it cannot be used."""
        ...

    def end_tokens(self) -> list[int]:
        """Ids that end an answer besides those of `generation` and `config`: the tokenizer's own end, and the end of a
        turn in `templates`. May be empty, and may repeat ids of those two."""
        ...

    def special_tokens(self) -> dict[str, str]:
        """The special tokens its chat template may name (`bos_token`, `eos_token`, …); empty where no file says."""
        ...
