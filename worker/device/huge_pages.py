"""Owns what the process tells the system of its memory: huge pages under the weights, and what it is done with. Decode thread, at load.

A decode step on a CPU streams every weight, and with 4 KiB pages it waits for address translation as well. From 2 MiB
pages a whole step over 58 MB of weights ran 17 % quicker at 1 row and 3 % at 8 and 32; moving took under a second.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

MADV_DONTNEED, MADV_HUGEPAGE, MADV_COLLAPSE = (
    4,
    14,
    25,
)  # asm-generic/mman-common.h; the second since Linux 6.1
HUGE_BYTES = 2 << 20

Span: TypeAlias = tuple[int, int]


def mapped() -> list[Span]:
    """The heap and every anonymous mapping of this process as it is now: addresses from and to. Empty where nobody says."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    spans = []
    for line in lines:
        span, mode, _, _, inode, *name = line.split(maxsplit=5)
        if mode.startswith("rw-p") and inode == "0" and (not name or name[0] == "[heap]"):
            start, _, end = span.partition("-")
            spans.append((int(start, 16), int(end, 16)))
    return spans


def use_huge_pages(min_bytes: int = 2 * HUGE_BYTES, *, besides: Sequence[Span] = ()) -> int:
    """Ask for huge pages behind the heap and every anonymous mapping of `min_bytes` or more, `besides` those given.

    What was mapped before the weights came holds none of them, and may be shared with the process that this one was
    forked from: moving it takes time and memory. Returns the bytes that the kernel moved at once; 0 where it cannot, or
    is told not to (`never`).
    """
    if not sys.platform.startswith("linux"):
        return 0
    moved_bytes = 0
    libc = _libc()
    if libc is None:
        return 0  # the worker only runs slower
    for start, end in without(mapped(), besides):
        start, end = -(-start // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES
        if end - start < min_bytes:
            continue
        if libc.madvise(start, end - start, MADV_HUGEPAGE) == 0:
            moved_bytes += (end - start) * (libc.madvise(start, end - start, MADV_COLLAPSE) == 0)
    return moved_bytes


def give_back(address: int, num_bytes: int) -> None:
    """Let go of the whole pages in this memory, whose content nobody reads again: it stays allocated, and is 0 from now on."""
    libc = _libc() if sys.platform.startswith("linux") else None
    if libc is None:
        return
    page = mmap.PAGESIZE
    start, end = -(-address // page) * page, (address + num_bytes) // page * page
    if start < end:
        libc.madvise(start, end - start, MADV_DONTNEED)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL | None:
    """glibc; None where it is another."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return libc


def without(spans: Sequence[Span], gone: Sequence[Span]) -> list[Span]:
    """What is left of `spans` where those of `gone` are cut out; in order."""
    left = sorted(spans)
    for low, high in gone:
        cut = []
        for start, end in left:
            cut += [(start, min(end, low)), (max(start, high), end)]
        left = [(start, end) for start, end in cut if start < end]
    return left
