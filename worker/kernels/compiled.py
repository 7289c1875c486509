"""Owns telling whether kernels are compiled or interpreted, and what follows from it. Decode thread."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: it knows no bf16 products, so operands are widened first."""
    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=8)
def num_multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; few for the interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number` (≥ 1): block shapes must be one."""
    return 1 << (number - 1).bit_length()


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter takes int() of a one-element array for a loop's bound; NumPy 2.4 refuses that."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


if is_interpreted():
    _mend_interpreter()
