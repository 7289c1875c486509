"""Owns the one rule for every field of every body, at every level: used, or accepted because it changes nothing, or refused.

A struct lists the fields it knows. Those in its `REFUSED` are refused by name when they ask for something; those in its
`IGNORED` change nothing about the answer; any other is unknown and refused with its path. `docs/api.md` repeats the lists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
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
        refused, nested = _plan(type(value))
        for name in refused:
            if getattr(value, name) not in NOTHING:
                param = _join(path, name)
                message = f"{param} is not supported by this server; leave it out"
                raise RequestError(ErrorCode.UNSUPPORTED, message, param=param)
        for name in nested:
            check_refused(getattr(value, name), _join(path, name))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@functools.cache
def _plan(kind: type[Known]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The refused fields of a struct, and those that may hold further structs."""
    nested = tuple(field.name for field in msgspec.structs.fields(kind) if any(_structs(field.type)))
    return kind.REFUSED, nested


def _structs(annotation: Any) -> Iterator[bool]:
    if isinstance(annotation, type) and issubclass(annotation, Known):
        yield True
    for inner in get_args(annotation):
        yield from _structs(inner)
