"""A reader of MessagePack that was written from its specification, so that what Degas writes is read by something else."""

from __future__ import annotations

import struct


def read(data: bytes) -> object:
    """The one value in `data`. Raises ValueError for anything else."""
    value, end = _value(data, 0)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes follow the value")
    return value


def _value(data: bytes, at: int) -> tuple[object, int]:
    kind, at = data[at], at + 1
    if kind <= 0x7F:
        return kind, at
    if kind >= 0xE0:
        return kind - 0x100, at
    if kind in _FIXED:
        return _FIXED[kind], at
    if kind in _NUMBERS:
        form = _NUMBERS[kind]
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if 0x80 <= kind <= 0x8F or kind in (0xDE, 0xDF):
        size, at = (kind & 0x0F, at) if kind < 0x90 else _size(data, at, 2 << (kind - 0xDE))
        pairs = []
        for _ in range(size):
            key, at = _value(data, at)
            value, at = _value(data, at)
            pairs.append((key, value))
        return dict(pairs), at
    if 0x90 <= kind <= 0x9F or kind in (0xDC, 0xDD):
        size, at = (kind & 0x0F, at) if kind < 0xA0 else _size(data, at, 2 << (kind - 0xDC))
        items = []
        for _ in range(size):
            item, at = _value(data, at)
            items.append(item)
        return items, at
    if 0xA0 <= kind <= 0xBF or 0xD9 <= kind <= 0xDB:
        size, at = (kind & 0x1F, at) if kind < 0xC0 else _size(data, at, 1 << (kind - 0xD9))
        return data[at : at + size].decode(), at + size
    if 0xC4 <= kind <= 0xC6:
        size, at = _size(data, at, 1 << (kind - 0xC4))
        return data[at : at + size], at + size
    raise ValueError(f"byte {kind:#x} begins nothing that is expected here")


def _size(data: bytes, at: int, width: int) -> tuple[int, int]:
    return int.from_bytes(data[at : at + width], "big"), at + width


_FIXED = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
