"""Owns the table of words: token ids to rows of numbers, out of a tensor, or of the weight that the head multiplies by. Decode thread.

A model whose head is tied to its embeddings has one matrix for both. On a CPU the head keeps it packed, and a row read back from
there has the same bits, so no second copy is held for look-up.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.linear import PackedLinear


class Words(Protocol):
    """A table (V, D)."""

    @property
    def device(self) -> torch.device:
        """Where rows come out."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that rows come out in."""
        ...

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(N,) int64 ids → (N, D). Raises IndexError for an id outside the table."""
        ...


class Table:
    """A table of its own: a tensor (V, D)."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def device(self) -> torch.device:
        """See `Words`."""
        return self.tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """See `Words`."""
        return self.tensor.dtype

    def __call__(self, token_ids: Tensor) -> Tensor:
        """See `Words`."""
        return F.embedding(token_ids, self.tensor)


class TiedWords:
    """The rows of a head's packed weight. `table`: of a model that is only counted (`blank`) the tensor that a device holds
    beside the head where its packed weight cannot be read back."""

    __slots__ = ("packed", "table")

    def __init__(self, packed: PackedLinear, table: Tensor | None = None) -> None:
        self.packed, self.table = packed, table

    @property
    def device(self) -> torch.device:
        """See `Words`."""
        return self.packed.device

    @property
    def dtype(self) -> torch.dtype:
        """See `Words`."""
        return self.packed.dtype

    def __call__(self, token_ids: Tensor) -> Tensor:
        """See `Words`."""
        return self.packed.rows(token_ids) if self.table is None else F.embedding(token_ids, self.table)
