"""Owns the GGUF container: its metadata and where its tensors lie, read with every bound checked. Any thread.

Files are not trusted: counts, lengths and offsets are checked against the rest of the file before memory is allocated
for them. Reads go through the file, not a mapping, so a file that is cut short meanwhile raises an error and does not
kill the process.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from worker.formats.errors import CheckpointError
from worker.formats.lfs import refuse_pointer

MAGIC = b"GGUF"
# Far beyond any model: vocabularies have up to 300,000 tokens and as many merges.
MAX_ELEMENTS = 4 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 1 << 16
MAX_DIMENSIONS = 4
MAX_HEADER_BYTES = 64 << 20  # the largest vocabularies with all their merges take a quarter of it

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class BlockType:
    """How values of one ggml type are stored: `num_values` of them in `num_bytes` bytes."""

    name: str
    num_values: int
    num_bytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}
"""ggml's type number → how it is stored. Repacked types (Q4_0_4_4 and their like) are no longer written."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `offset` counts from the file's start; `shape` is row-major, as torch has it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    num_bytes: int

    @property
    def num_values(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Container:
    """One GGUF file. Metadata: numbers, strings, lists of strings, and numpy arrays of numbers."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def usual_type(self) -> str:
        """ggml's name for the type of most of its weights."""
        numbers: Counter[str] = Counter()
        for tensor in self.tensors.values():
            numbers[tensor.type.name] += tensor.num_values
        return numbers.most_common(1)[0][0]


def read_container(path: Path) -> Container:
    """Read what a GGUF file says of itself; its weights stay on disk. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return _Reader(path, file).read()
    except FileNotFoundError:
        raise CheckpointError("no such file", file=path) from None
    except OSError as error:
        raise CheckpointError(f"not readable: {error.strerror or error}", file=path) from error


class _Reader:
    """Reads one header front to back, never past the file's end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._file_bytes = os.fstat(file.fileno()).st_size
        self._left = min(self._file_bytes, MAX_HEADER_BYTES)

    def read(self) -> Container:
        """The whole header."""
        magic = self._file.read(4)
        if magic != MAGIC:
            refuse_pointer(self._path)
            raise self._error(f"not a GGUF file: it starts with {magic!r} in place of {MAGIC!r}")
        self._left -= 4
        version = self._number("I")
        if version not in (2, 3):
            big_endian = int(version).to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3")
            why = "written for big-endian machines" if big_endian else "versions 2 and 3 are read"
            raise self._error(f"GGUF version {version}: {why}; convert it again with a current llama.cpp")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        if num_keys > MAX_KEYS or num_tensors > MAX_TENSORS:
            raise self._error(f"{num_keys} settings and {num_tensors} tensors cannot be true: a damaged file")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string(MAX_NAME_BYTES)
            if key in metadata:
                raise self._error(f"the setting {key!r} is stored twice")
            metadata[key] = self._value(key)
        return Container(self._path, metadata, self._tensors(num_tensors, metadata))

    def _tensors(self, num_tensors: int, metadata: dict[str, Any]) -> dict[str, StoredTensor]:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._error(f"'general.alignment' is {alignment!r}; it is a power of two")
        found: list[tuple[str, tuple[int, ...], BlockType, int]] = []
        for _ in range(num_tensors):
            name = self._string(MAX_NAME_BYTES)
            num_dimensions = self._number("I")
            if not 1 <= num_dimensions <= MAX_DIMENSIONS:
                raise self._error(f"{num_dimensions} dimensions; tensors have 1 to {MAX_DIMENSIONS}", name)
            shape = tuple(self._number("Q") for _ in range(num_dimensions))[::-1]
            kind, offset = self._number("I"), self._number("Q")
            block = BLOCK_TYPES.get(kind)
            if block is None:
                raise self._error(f"stored as ggml type {kind}, which is not known here", name)
            found.append((name, shape, block, offset))
        start = -(-self._file.tell() // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, block, offset in found:
            if name in tensors:
                raise self._error("stored twice", name)
            if min(shape) < 1 or shape[-1] % block.num_values:
                raise self._error(f"rows of {shape[-1]} values are no whole {block.name} blocks", name)
            num_bytes = math.prod(shape) // block.num_values * block.num_bytes
            if offset % alignment:
                raise self._error(f"lies at {offset}, which is no multiple of {alignment}", name)
            if start + offset + num_bytes > self._file_bytes:
                problem = (
                    f"bytes {start + offset} to {start + offset + num_bytes} lie outside a file of "
                    f"{self._file_bytes}: the download is incomplete"
                )
                raise self._error(problem, name)
            tensors[name] = StoredTensor(self._path, name, shape, block, start + offset, num_bytes)
        self._refuse_overlap(tensors)
        return tensors

    def _refuse_overlap(self, tensors: dict[str, StoredTensor]) -> None:
        by_place = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(by_place):
            if before.offset + before.num_bytes > after.offset:
                raise self._error(f"its bytes are also those of {before.name}: a damaged file", after.name)

    def _value(self, key: str) -> Any:
        kind = self._number("I")
        if kind == _STRING:
            return self._string(MAX_HEADER_BYTES)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._error(f"the setting {key!r} is of type {kind}, which GGUF does not have")
        element, length = self._number("I"), self._number("Q")
        if length > MAX_ELEMENTS:
            raise self._error(f"the setting {key!r} says that it has {length} elements: a damaged file")
        if element == _STRING:
            if 8 * length > self._left:
                raise self._truncated(8 * length)
            return [self._string(MAX_HEADER_BYTES) for _ in range(length)]
        if element not in _SCALARS:
            raise self._error(f"the setting {key!r} is a list of type {element}, which is not read here")
        dtype = np.dtype(_SCALARS[element]).newbyteorder("<")
        return np.frombuffer(self._bytes(length * dtype.itemsize), dtype)

    def _number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack(self._bytes(layout.size))[0]

    def _string(self, most: int) -> str:
        length = int.from_bytes(self._bytes(8), "little")
        if length > most:
            raise self._truncated(length)
        # Vocabularies hold tokens that are not whole characters; such text is kept as surrogates, not refused.
        return self._bytes(length).decode("utf-8", "surrogateescape")

    def _bytes(self, length: int) -> bytes:
        if length > self._left:
            raise self._truncated(length)
        self._left -= length
        found = self._file.read(length)
        if len(found) != length:
            raise self._truncated(length)
        return found

    def _truncated(self, length: int) -> CheckpointError:
        return self._error(
            f"asks for {length} bytes at {self._file.tell()} of a file of {self._file_bytes}: "
            "the download is incomplete, or the file is damaged"
        )

    def _error(self, problem: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(problem, file=self._path, tensor=tensor)
