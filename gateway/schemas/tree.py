"""Owns where schemas stand inside a schema, and what the objects around them mean. Pure.

`const`, `enum` and annotations hold values that may look like schemas and are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

Json = dict[str, Any]

NAMED: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
LISTED: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE: Final = (
    "items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else",
    "propertyNames", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
IN_PLACE: Final = ("anyOf", "oneOf", "allOf", "not", "if", "then", "else", "$ref")
"""Keywords whose schemas are about the same value as the schema that holds them."""

Place = tuple[Any, ...]
"""Steps from a schema to one inside it: a keyword, and behind some a name or an index."""


def inner(schema: Json) -> Iterator[tuple[Place, Any]]:
    """The schemas directly inside one, each with the steps that lead to it."""
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            yield from (((key, name), part) for name, part in value.items())
        elif key in LISTED or key == "items":
            if isinstance(value, list):
                yield from (((key, i), part) for i, part in enumerate(value))
            elif key == "items":
                yield (key,), value
        elif key in SINGLE:
            yield (key,), value


def rebuild(schema: Any, change: Callable[[Json, Json], Any], skip: tuple[str, ...] = ()) -> Any:
    """The schema with `change(made, original)` made to every schema in it, the innermost first; those behind the keywords
    `skip` stay as they are. The original is left alone."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for place, part in inner(schema):
        if isinstance(part, dict) and place[0] not in skip:
            _put(made, schema, place, rebuild(part, change, skip))
    return change(made, schema)


def _put(made: Json, original: Json, place: Place, part: Any) -> None:
    """Set a part of `made`, a shallow copy of `original`: the list or object in between is copied before its first change."""
    key = place[0]
    if len(place) == 1:
        made[key] = part
        return
    if made[key] is original.get(key):
        made[key] = list(made[key]) if isinstance(made[key], list) else dict(made[key])
    made[key][place[1]] = part


def every(schema: Any) -> Iterator[Json]:
    """Every schema in one, itself included."""
    level = [schema]
    while level:
        node = level.pop()
        if isinstance(node, dict):
            yield node
            level.extend(part for _, part in inner(node))


def target(root: Any, ref: str) -> Any:
    """What a reference within the document points at; None for others, and for those that point at nothing."""
    if ref in ("#", "#/"):
        return root
    if not ref.startswith("#/"):
        return None
    node = root
    for step in ref[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node
