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
    """The switches; each is on by default, because on is likely better."""

    pair_rows: bool = True  # products with a bias never see a single row: the smallest decode graph has two
    narrow_indexes: bool = True  # int32 indexes as they were uploaded; no int64 copies of them in a step
    tail_norm: bool = True  # the last residual sum and the final norm are one launch
    own_outputs: bool = True  # the sampling kernel writes next inputs and outputs itself
    tuned_attention: bool = True  # decode attention as `paged_decode_attention.TUNED` has it, else as `PLAIN`
    one_product: bool = True  # Moondream: qkv and the MLP's first layer are one product
    one_launch: bool = True  # Moondream: rotation, KV write and GELU are one launch
    histogram: bool = True  # sampling over a histogram of distances to the best, by several programs a row
    upload_aside: bool = True  # a step's inputs are uploaded beside the step before, on a stream of their own
    early_copy: bool = True  # decode rows of a mixed step are copied out and sent before its chunks end
    narrow_weights: bool = (
        True  # products multiply by 8- and 4-bit weights as they are; off: expanded as a model loads
    )
    vision_stream: bool = True  # pictures are encoded on a stream of their own, beside decode rows


_current = GpuChoices()


def choices() -> GpuChoices:
    """What is chosen now."""
    return _current


def names() -> list[str]:
    """The switches there are."""
    return [field.name for field in fields(GpuChoices)]


def switch_off(off: Iterable[str]) -> None:
    """Turn these switches off and all others on. Raises ValueError for a name that is none."""
    global _current
    _current = replace(GpuChoices(), **dict.fromkeys(_known(off), False))


@contextmanager
def without(*off: str) -> Iterator[None]:
    """For a block, with these switches off besides those that are off already. Raises ValueError for an unknown name."""
    global _current
    before = _current
    _current = replace(before, **dict.fromkeys(_known(off), False))
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
