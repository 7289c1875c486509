"""Owns the one rule for every field of every body, at every level: used, or accepted because it changes nothing, or refused.

A struct lists the fields it knows. Those in its `REFUSED` are refused by name when they ask for something; those in its
`IGNORED` change nothing about the answer; any other is unknown and refused with its path. `docs/api.md` repeats the lists.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, get_args

import msgspec

from gateway.generation import RequestError
from shared.errors import ErrorCode

NOTHING: Final[tuple[object, ...]] = (None, False, [], {}, "")
"""Values that ask for nothing: clients send them for fields they do not use."""


class Known(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Parent of every struct that a client's JSON is read into."""

    REFUSED: ClassVar[tuple[str, ...]] = ()
    IGNORED: ClassVar[tuple[str, ...]] = ()


def check_refused(value: object, path: str = "") -> None:
    """Raises `RequestError` UNSUPPORTED for the first refused field that asks for something, wherever it is."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            if not isinstance(item, msgspec.Struct | list):
                return  # lists are of one kind, and texts and numbers hold no fields
            check_refused(item, f"{path}[{index}]")
    elif isinstance(value, Known):
        plan = _plan(type(value))
        # Read at once: nearly every field of nearly every body is absent.
        if plan.refused and (given := plan.refused_of(value)) != plan.absent:
            _refuse(plan.refused, given, path)
        for name, inner in zip(plan.nested, plan.nested_of(value), strict=True):
            if inner is not None and not isinstance(inner, str):
                check_refused(inner, _join(path, name))


def _refuse(names: Sequence[str], values: Sequence[object], path: str) -> None:
    for name, value in zip(names, values, strict=True):
        if value not in NOTHING:
            param = _join(path, name)
            message = f"{param} is not supported by this server; leave it out"
            raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@dataclass(frozen=True, slots=True)
class _Plan:
    """The refused fields of a struct and those that may hold further structs, each with what reads them all."""

    refused: tuple[str, ...]
    refused_of: Callable[[object], tuple[object, ...]]
    absent: tuple[None, ...]  # the refused fields' values where none is given
    nested: tuple[str, ...]
    nested_of: Callable[[object], tuple[object, ...]]


@functools.cache
def _plan(kind: type[Known]) -> _Plan:
    nested = tuple(field.name for field in msgspec.structs.fields(kind) if any(_structs(field.type)))
    absent = (None,) * len(kind.REFUSED)
    return _Plan(kind.REFUSED, _reader(kind.REFUSED), absent, nested, _reader(nested))


def _reader(names: tuple[str, ...]) -> Callable[[object], tuple[object, ...]]:
    """What gives the values of all these attributes."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


def _structs(annotation: Any) -> Iterator[bool]:
    if isinstance(annotation, type) and issubclass(annotation, Known):
        yield True
    for inner in get_args(annotation):
        yield from _structs(inner)
