"""Owns closing objects: one that lists its properties and does not mention others is taken to have no others. Pure.

A small model would add properties until its tokens run out. An object is closed only where it stands alone: where another
schema speaks of the same object (beside `anyOf`, below `allOf`, behind a `$ref` with neighbours), closing one part could
forbid what the other demands. What the closed schema allows, the open one allows too.
"""

from __future__ import annotations

from typing import Any, Final

from gateway.schemas.tree import IN_PLACE, Json, every, inner, rebuild, target

_SPEAKS: Final = frozenset(
    (
        "additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "dependencies",
        "dependentSchemas", "dependentRequired", "$dynamicRef", "$recursiveRef", *IN_PLACE,
    )
)  # fmt: skip
"""Keywords by which a schema that lists properties may say something about others."""
_SILENT: Final = frozenset(("$defs", "definitions", "$schema", "$id", "id", "$anchor", "type", "nullable"))
"""Keywords beside which a `$ref` or an `anyOf` is still alone: they say nothing about properties."""


def close_objects(root: Any) -> Any:
    """The schema with its objects closed. There must be no `oneOf` left: its branches are compared as they were written."""
    if any(_leads_away(node, root) for node in every(root)):
        return root
    shared = _shared(root)

    def close(made: Json, original: Json) -> Json:
        if id(original) not in shared and _closes(original):
            made["additionalProperties"] = False
        return made

    return rebuild(root, close, skip=("not", "if"))


def _leads_away(schema: Json, root: Any) -> bool:
    """Whether a schema refers to one that cannot be told from here: it may be a part of any object."""
    if "$dynamicRef" in schema or "$recursiveRef" in schema:
        return True
    ref = schema.get("$ref")
    return isinstance(ref, str) and target(root, ref) is None


def _closes(schema: Json) -> bool:
    listed, needed = schema.get("properties"), schema.get("required", [])
    if not isinstance(listed, dict) or not listed or not isinstance(needed, list):
        return False
    if not _SPEAKS.isdisjoint(schema):
        return False
    least = schema.get("minProperties", 0)
    return (
        all(isinstance(name, str) and name in listed for name in needed)
        and isinstance(least, int)
        and least <= len(listed)
    )


def _shared(root: Any) -> set[int]:
    """The schemas whose object another schema speaks of as well, by identity."""
    shared: dict[int, Json] = {}
    level: list[Any] = []
    alone: list[tuple[Json, list[Any]]] = []  # schemas that are nothing but other schemas
    for node in every(root):
        parts = _in_place(node, root)
        if not parts:
            continue
        if len([key for key in IN_PLACE if key in node]) == 1 and _SILENT.issuperset(
            key for key in node if key not in ("anyOf", "$ref")
        ):
            alone.append((node, parts))
        else:
            level += parts
    waiting = {id(node): parts for node, parts in alone}
    while level:
        node = level.pop()
        if isinstance(node, dict) and id(node) not in shared:
            shared[id(node)] = node
            level += waiting.get(id(node), [])
    return set(shared)


def _in_place(schema: Json, root: Any) -> list[Any]:
    """The schemas that speak of the same value as this one."""
    parts = [
        part
        for place, part in inner(schema)
        if place[0] in IN_PLACE or place[0] in ("dependentSchemas", "dependencies")
    ]
    ref = schema.get("$ref")
    if isinstance(ref, str):
        parts.append(target(root, ref))
    return parts
