"""Owns the one library of compiled operations, and where it may be used. Decode thread."""

from __future__ import annotations

from ctypes import CDLL
from functools import lru_cache

import torch

from worker.native.build import SOURCE, compiled


def library(device: torch.device) -> CDLL | None:
    """The operations, compiled at the first call; None where they cannot be had, or would leave threads idle."""
    return load() if device.type == "cpu" and torch.get_num_threads() == 1 else None


@lru_cache(maxsize=1)
def load() -> CDLL | None:
    """The library, whatever the device."""
    return compiled(SOURCE)
