"""Owns recording calls of the compiled operations with all that they read, to make them here and on an emulated processor.

The file that `calls.cpp` reads is numbers of 64 bits: how many buffers, and of each its bytes and what it holds; how many addresses
stand in buffers, and of each the buffer and the offset where it stands, and those that it means; how many calls, and of each a name in
64 bytes, how many arguments, and of each its kind (0: a number, 1: a float, 2: an address), and a value, or a buffer and an offset. What
it writes is all buffers as the calls left them.
"""

from __future__ import annotations

import struct
import subprocess
from ctypes import CDLL, Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class At:
    """A place in a tape's buffer."""

    buffer: int
    offset: int = 0


@dataclass(slots=True)
class Record:
    """A C structure, and the places that its pointers mean by their offset."""

    content: bytes
    places: dict[int, At] = field(default_factory=dict)


Argument = int | float | At | None


def record(kind: type[Structure], **fields: int | float | At | Record | None) -> Record:
    """A structure of `kind`; pointers are given as places, structures within it as records."""
    made, places, inner = kind(), {}, []
    for name, value in fields.items():
        offset = getattr(kind, name).offset
        if isinstance(value, At):
            places[offset] = value
        elif isinstance(value, Record):
            inner.append((offset, value.content))
            places.update({offset + at: place for at, place in value.places.items()})
        else:
            setattr(made, name, value)
    content = bytearray(bytes(made))
    for offset, part in inner:
        content[offset : offset + len(part)] = part
    return Record(bytes(content), places)


class Tape:
    """Calls in order, each with its arguments; whoever runs it starts with the same buffers."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._addresses: list[tuple[At, At]] = []
        self._calls: list[tuple[str, tuple[Argument, ...]]] = []

    def put(self, content: Tensor) -> At:
        """A buffer with a copy of the tensor."""
        self._buffers.append(content.detach().contiguous().clone().view(-1).view(torch.uint8))
        return At(len(self._buffers) - 1)

    def room(self, num_bytes: int) -> At:
        """A buffer of zeros."""
        return self.put(torch.zeros(num_bytes, dtype=torch.uint8))

    def put_records(self, *records: Record) -> At:
        """Structures one behind another."""
        at = self.put(
            torch.frombuffer(bytearray(b"".join(one.content for one in records)), dtype=torch.uint8)
        )
        start = 0
        for one in records:
            for offset, place in one.places.items():
                self.point(At(at.buffer, start + offset), place)
            start += len(one.content)
        return at

    def point(self, where: At, to: At) -> None:
        """The address of `to` shall stand at `where`."""
        self._addresses.append((where, to))

    def call(self, name: str, *args: Argument) -> None:
        """Floats are 32 bits wide, all other arguments 64."""
        self._calls.append((name, args))

    def run_here(self, library: CDLL) -> list[Tensor]:
        """What all buffers hold after the calls."""
        buffers = [buffer.clone() for buffer in self._buffers]

        def address(at: At) -> int:
            return buffers[at.buffer].data_ptr() + at.offset

        for where, to in self._addresses:
            buffers[where.buffer][where.offset : where.offset + 8].view(torch.int64)[0] = address(to)
        for name, args in self._calls:
            given = [
                c_float(arg)
                if isinstance(arg, float)
                else c_void_p(None if arg is None else address(arg))
                if arg is None or isinstance(arg, At)
                else c_int64(arg)
                for arg in args
            ]
            getattr(library, name)(*given)
        return buffers

    def run_by(self, command: list[str], folder: Path) -> list[Tensor]:
        """The same, by a program of `calls.cpp`. Raises RuntimeError if it fails."""
        calls, left = folder / "calls", folder / "left"
        calls.write_bytes(self._packed())
        done = subprocess.run([*command, str(calls), str(left)], capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        content = torch.frombuffer(bytearray(left.read_bytes()), dtype=torch.uint8)
        return [part.clone() for part in content.split([len(buffer) for buffer in self._buffers])]

    def _packed(self) -> bytes:
        parts = [struct.pack("<q", len(self._buffers))]
        for buffer in self._buffers:
            parts += [struct.pack("<q", len(buffer)), buffer.numpy().tobytes()]
        parts.append(struct.pack("<q", len(self._addresses)))
        for where, to in self._addresses:
            parts.append(struct.pack("<4q", where.buffer, where.offset, to.buffer, to.offset))
        parts.append(struct.pack("<q", len(self._calls)))
        for name, args in self._calls:
            parts.append(struct.pack("<64sq", name.encode(), len(args)))
            for arg in args:
                if isinstance(arg, float):
                    parts.append(struct.pack("<qfiq", 1, arg, 0, 0))
                elif isinstance(arg, At):
                    parts.append(struct.pack("<3q", 2, arg.buffer, arg.offset))
                else:
                    parts.append(struct.pack("<3q", 0, arg or 0, 0))
        return b"".join(parts)
