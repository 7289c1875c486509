"""Owns reading tensors' bytes out of a GGUF file: whole small ones, and large ones a piece at a time. Any thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from worker.formats.errors import CheckpointError
from worker.formats.gguf_container import Container, StoredTensor

PIECE_BYTES = 8 << 20


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
    values = np.frombuffer(piece, np.float32)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise CheckpointError("holds values that are not finite and above 0", file=stored.path, tensor=name)
    return values


def pieces(stored: StoredTensor) -> Iterator[tuple[int, bytearray]]:
    """(index of the first block, bytes of whole blocks) until all of the tensor was read. Raises CheckpointError."""
    block_bytes = stored.type.num_bytes
    step = max(1, PIECE_BYTES // block_bytes) * block_bytes
    try:
        with stored.path.open("rb", buffering=0) as file:
            for start in range(0, stored.num_bytes, step):
                piece = bytearray(min(step, stored.num_bytes - start))
                view, done = memoryview(piece), 0
                while done < len(piece):
                    got = os.preadv(file.fileno(), [view[done:]], stored.offset + start + done)
                    if not got:
                        raise CheckpointError(
                            "the file was cut short while it was read", file=stored.path, tensor=stored.name
                        )
                    done += got
                yield start // block_bytes, piece
    except OSError as error:
        raise CheckpointError(
            f"not readable: {error.strerror or error}", file=stored.path, tensor=stored.name
        ) from error
