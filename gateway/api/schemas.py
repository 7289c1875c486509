"""Owns what a JSON schema is taken to mean where JSON Schema leaves it open. Gateway's loop.

An object that lists its properties and does not mention others is closed: a small model would add properties until its
tokens run out. What the closed schema allows, the open one allows too. `"additionalProperties": true` keeps it open.
"""

from __future__ import annotations

from typing import Any, Final

from gateway.api.parameters import Json

_COMBINED: Final = frozenset(
    ("allOf", "not", "if", "dependentSchemas", "patternProperties", "unevaluatedProperties", "$dynamicRef")
)
"""Keywords that combine schemas: a property may be declared in another part, so closing one part could forbid everything."""
_BESIDE: Final = ("$ref", "anyOf", "oneOf")
_NAMED: Final = ("properties", "$defs", "definitions")
_LISTED: Final = ("anyOf", "oneOf", "prefixItems")
_SINGLE: Final = ("items", "additionalProperties", "contains")


def close_objects(schema: Json) -> Json:
    """The schema with its objects closed, or as it is where it combines schemas. At most `MAX_DEPTH` deep."""
    return schema if _combines(schema) else _closed(schema)


def _parts(schema: Json) -> list[Any]:
    """The schemas directly inside one."""
    parts = [schema.get(key) for key in _SINGLE]
    for key in _LISTED:
        listed = schema.get(key)
        parts += listed if isinstance(listed, list) else []
    for key in _NAMED:
        named = schema.get(key)
        parts += named.values() if isinstance(named, dict) else []
    return parts


def _combines(schema: Json) -> bool:
    return not _COMBINED.isdisjoint(schema) or any(
        _combines(part) for part in _parts(schema) if isinstance(part, dict)
    )


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in _SINGLE:
        if key in made:
            made[key] = _closed(made[key])
    for key in _LISTED:
        if isinstance(made.get(key), list):
            made[key] = [_closed(part) for part in made[key]]
    for key in _NAMED:
        if isinstance(made.get(key), dict):
            made[key] = {name: _closed(part) for name, part in made[key].items()}
    if _closes(made):
        made["additionalProperties"] = False
    return made


def _closes(schema: Json) -> bool:
    listed, needed = schema.get("properties"), schema.get("required", [])
    if not isinstance(listed, dict) or not listed or not isinstance(needed, list):
        return False
    if "additionalProperties" in schema or any(key in schema for key in _BESIDE):
        return False
    return all(name in listed for name in needed if isinstance(name, str))
