"""Owns the one library of compiled operations, and where it may be used. Decode thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL, c_char_p
from functools import lru_cache
from typing import Any, TypeVar

import torch

from worker.native.build import SOURCE, compiled

Bound = TypeVar("Bound")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""The dtypes that have functions, with the ending of the functions' names."""


_torch_alone = False


def library(device: torch.device) -> CDLL | None:
    """The operations, compiled at the first call; None where they cannot be had."""
    return load() if device.type == "cpu" and not _torch_alone else None


@contextmanager
def torch_alone() -> Iterator[None]:
    """For a block: a model that loads in it computes by torch's operations for good, as a reference to compare with."""
    global _torch_alone
    before, _torch_alone = _torch_alone, True
    try:
        yield
    finally:
        _torch_alone = before


def use_threads(num_threads: int) -> None:
    """From now on that many threads compute on the CPU. Call before a model loads, and never while a call is under way.

    Where there are compiled operations their own threads share the work, and torch keeps to one: two teams that both
    spin while they wait would take the cores from each other.
    """
    found = load()
    if found is not None:
        found.use_threads(num_threads)
    torch.set_num_threads(num_threads if found is None else 1)


def bind(kind: Callable[[CDLL], Bound], device: torch.device) -> Bound | None:
    """`kind` over the library, made once; None where that cannot be had."""
    found = library(device)
    return None if found is None else _bound(kind, found)


@lru_cache
def _bound(kind: Callable[[CDLL], Any], found: CDLL) -> Any:
    return kind(found)


def instruction_set(found: CDLL) -> str:
    """What a library was compiled for, such as "AVX-512, AMX bf16, VNNI int8"."""
    found.instruction_set.restype = c_char_p
    name: bytes = found.instruction_set()
    return name.decode()


@lru_cache(maxsize=1)
def load() -> CDLL | None:
    """The library, whatever the device."""
    return compiled(SOURCE)
