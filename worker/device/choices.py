"""Owns the choices between two ways of doing the same work on a GPU, so that each can be measured on and off. Decode thread.

They are read when a runner is made, and whenever a step is recorded or runs eagerly: a change concerns what is captured
after it. docs/gpu.md ("Switches") says what each should gain; no choice changes a token beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class GpuChoices:
    """The switches, each as it serves best on the GPUs that it was measured on (docs/gpu.md)."""

    pair_rows: bool = False  # products with a bias never see a single row: the smallest decode graph has two
    narrow_indexes: bool = True  # int32 indexes as they were uploaded; no int64 copies of them in a step
    tail_norm: bool = True  # the last residual sum and the final norm are one launch
    own_outputs: bool = True  # the sampling kernel writes next inputs and outputs itself
    tuned_attention: bool = (
        True  # decode attention of single heads as `paged_decode_attention.DOTS`, else as `PLAIN`
    )
    one_product: bool = True  # Moondream: qkv and the MLP's first layer are one product
    one_launch: bool = True  # Moondream: rotation, KV write and GELU are one launch
    histogram: bool = True  # sampling over a histogram of distances to the best, by several programs a row
    upload_aside: bool = True  # a step's inputs are uploaded beside the step before, on a stream of their own
    early_copy: bool = True  # decode rows of a mixed step are copied out and sent before its chunks end
    narrow_weights: bool = (
        True  # products multiply by 8- and 4-bit weights as they are; off: expanded as a model loads
    )
    vision_stream: bool = True  # pictures are encoded on a stream of their own, beside decode rows
    vision_gelu: bool = True  # the vision encoder's first product of an MLP takes its GELU itself
    last_joins: bool = False  # decode attention: the last program of a head to end joins its parts
    own_products: bool = True  # products of at most 32 rows by `kernels.few_rows_product`, not by cuBLAS
    dependent_launch: bool = True  # a kernel of a decode step is launched before the one it waits for ends


_current = GpuChoices()


def choices() -> GpuChoices:
    """What is chosen now."""
    return _current


def names() -> list[str]:
    """The switches there are."""
    return [field.name for field in fields(GpuChoices)]


def is_on(name: str) -> bool:
    """Whether a switch is on unless somebody turns it."""
    return bool(getattr(GpuChoices(), name))


def switch(off: Iterable[str] = (), on: Iterable[str] = ()) -> None:
    """Turn these off and those on, and leave all others as they are by default. Raises ValueError for a name that is none."""
    global _current
    turned = dict.fromkeys(_known(off), False) | dict.fromkeys(_known(on), True)
    _current = replace(GpuChoices(), **turned)


@contextmanager
def without(*off: str) -> Iterator[None]:
    """For a block, with these switches off besides those that are off already. Raises ValueError for an unknown name."""
    with _turned(dict.fromkeys(_known(off), False)):
        yield


@contextmanager
def flipped(*turned: str) -> Iterator[None]:
    """For a block, with these switches not as they are by default. Raises ValueError for an unknown name."""
    with _turned({name: not is_on(name) for name in _known(turned)}):
        yield


@contextmanager
def _turned(positions: dict[str, bool]) -> Iterator[None]:
    global _current
    before = _current
    _current = replace(before, **positions)
    try:
        yield
    finally:
        _current = before


def _known(given: Iterable[str]) -> list[str]:
    asked = [name.strip() for name in given if name.strip()]
    unknown = sorted(set(asked) - set(names()))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such switch; there are {', '.join(names())}")
    return asked
