"""Owns saying which compiled operations a worker has here, and what is left to torch. Main thread of `degas doctor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from worker.native.build import KINDS, SOURCE, kept_library, prebuilt, processor_flags


@dataclass(frozen=True, slots=True)
class KernelsInUse:
    """What multiplies here. `products`: formats of weights by dtype of activations."""

    instructions: str
    library: str  # its file's name; empty: there is none yet
    products: dict[str, tuple[str, ...]] = field(default_factory=dict)
    heads: tuple[int, ...] = ()  # widths that compiled attention takes


def kernels_in_use() -> KernelsInUse:
    """Looks at what is there; compiles nothing."""
    found = prebuilt(SOURCE)
    kept = kept_library(SOURCE) if found is None else None
    if found is None and kept is None:
        return KernelsInUse(processor_kind(), "")
    from worker.native.library import NAMES, instruction_set, load  # torch
    from worker.native.operations import HEAD_DIMS
    from worker.native.products import Products
    from worker.native.quantised import KINDS as BLOCKS

    loaded = load()
    if loaded is None:
        return KernelsInUse(processor_kind(), "")
    made = Products(loaded)
    formats = {"float32": ("fp32", "bf16"), "bfloat16": ("bf16",)}
    products = {
        name: (*formats[name], *(BLOCKS if made.multiplies_blocks(dtype) else ()))
        for dtype, name in NAMES.items()
        if made.multiplies(dtype)
    }
    return KernelsInUse(instruction_set(loaded), Path(loaded._name).name, products, HEAD_DIMS)


def processor_kind() -> str:
    """The best of `build.KINDS` that this processor runs; empty where it runs none."""
    flags = processor_flags()
    return next((kind for kind, (_, needed) in KINDS.items() if needed <= flags), "")
