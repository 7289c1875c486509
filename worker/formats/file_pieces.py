"""Owns reading a stretch of a file a piece at a time, into memory that is used again. Any thread.

Reads go through the file, not a mapping: a file that is cut short meanwhile raises an error and does not kill the process,
and no page of it counts as the process's own beside the copy that is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from worker.formats.errors import CheckpointError

PIECE_BYTES = 8 << 20


def read_pieces(
    path: Path, tensor: str, offset: int, num_bytes: int, whole: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """(N,) uint8 each, N a multiple of `whole` bytes, about 8 MiB, until `num_bytes` behind `offset` were read. Each is
    valid until the next one is asked for. Raises CheckpointError, naming `tensor`."""
    step = max(1, PIECE_BYTES // whole) * whole
    buffer = np.empty(min(step, num_bytes), np.uint8)
    view = buffer.data
    try:
        with path.open("rb", buffering=0) as file:
            for start in range(0, num_bytes, step):
                count, done = min(step, num_bytes - start), 0
                while done < count:
                    got = os.preadv(file.fileno(), [view[done:count]], offset + start + done)
                    if not got:
                        raise CheckpointError(
                            "the file was cut short while it was read", file=path, tensor=tensor
                        )
                    done += got
                yield buffer[:count]
    except OSError as error:
        raise CheckpointError(f"not readable: {error.strerror or error}", file=path, tensor=tensor) from error
