"""Owns reading tensors' bytes out of a GGUF file: whole small ones, and large ones a piece at a time. Any thread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from worker.formats.errors import CheckpointError
from worker.formats.file_pieces import read_pieces
from worker.formats.gguf_container import Container, StoredTensor


def small_values(container: Container, name: str, length: int) -> np.ndarray:
    """(length,) fp32 of a tensor that is stored as such. Raises CheckpointError."""
    stored = container.tensors[name]
    if stored.type.name != "F32" or stored.shape != (length,):
        raise CheckpointError(
            f"expected F32, found {stored.type.name}",
            file=stored.path,
            tensor=name,
            expected=(length,),
            found=stored.shape,
        )
    ((_, piece),) = pieces(stored)
    values = piece.view(np.float32)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise CheckpointError("holds values that are not finite and above 0", file=stored.path, tensor=name)
    return values


def pieces(stored: StoredTensor) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """(index of the first block, bytes of whole blocks) until all of the tensor was read, see `read_pieces`. Raises
    CheckpointError."""
    first, block_bytes = 0, stored.type.num_bytes
    for piece in read_pieces(stored.path, stored.name, stored.offset, stored.num_bytes, block_bytes):
        yield first, piece
        first += len(piece) // block_bytes
