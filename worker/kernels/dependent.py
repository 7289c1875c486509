"""Owns programmatic dependent launch: a kernel is launched before the one it waits for has ended. Decode thread.

From Hopper on (CUDA programming guide, "Programmatic Dependent Launch"). A kernel launched so may run beside the end of the
one before it, up to `await_inputs`; that waits until all before it has ended and its writes are seen, then lets the next
kernel be launched. Every program of such a kernel must call it, and before it touch only what no step writes (weights), so
that waiting for one kernel is waiting for all before it. Where it is off, and in the interpreter, nothing of it is there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from worker.device.choices import choices
from worker.kernels.compiled import is_interpreted


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Until the kernel before has ended; then the next may be launched."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for these lines to be brought into the L2. For compiled kernels alone; the pointers must be valid."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def launch_options(device: torch.device) -> dict[str, Any]:
    """What a launcher adds to a kernel that calls `await_inputs`: its constant, and how it is launched."""
    if not choices().dependent_launch or is_interpreted() or not _knows(device):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


@lru_cache(maxsize=8)
def _knows(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
