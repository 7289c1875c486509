"""Owns the header of a safetensors file: which tensors it holds, and where. Any thread; without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from worker.formats.errors import CheckpointError
from worker.formats.lfs import refuse_pointer

_MAX_HEADER_BYTES = 100 << 20


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Stored tensors by name: dtype, shape, first byte in the file, bytes. Raises CheckpointError on a header that cannot be true."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                refuse_pointer(path)
                problem = f"header of {header_bytes} bytes in a file of {size}: the download is incomplete, or this is not safetensors"
                raise CheckpointError(problem, file=path)
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - header_bytes:
                problem = f"bytes {begin} to {end} lie outside the file: the download is incomplete"
                raise CheckpointError(problem, file=path, tensor=name)
            shape = tuple(int(length) for length in entry["shape"])
            tensors[name] = (str(entry["dtype"]), shape, 8 + header_bytes + begin, end - begin)
        return tensors
    except FileNotFoundError:
        raise CheckpointError("no such file", file=path) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a safetensors header: {error!r}", file=path) from error


def stored_names(file: Path) -> set[str]:
    """The tensors' names in a safetensors file. Raises CheckpointError on a header that cannot be true."""
    return set(read_header(file))
