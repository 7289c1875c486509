"""Owns the one library of compiled operations, and where it may be used. Decode thread."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL
from functools import lru_cache
from typing import Any, TypeVar

import torch

from worker.native.build import SOURCE, compiled

Bound = TypeVar("Bound")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""The dtypes there are functions for, as the functions' names end."""


def library(device: torch.device) -> CDLL | None:
    """The operations, compiled at the first call; None where they cannot be had, or would leave threads idle."""
    return load() if device.type == "cpu" and torch.get_num_threads() == 1 else None


def bind(kind: Callable[[CDLL], Bound], device: torch.device) -> Bound | None:
    """`kind` over the library, made once; None where that cannot be had."""
    found = library(device)
    return None if found is None else _bound(kind, found)


@lru_cache
def _bound(kind: Callable[[CDLL], Any], found: CDLL) -> Any:
    return kind(found)


@lru_cache(maxsize=1)
def load() -> CDLL | None:
    """The library, whatever the device."""
    return compiled(SOURCE)
