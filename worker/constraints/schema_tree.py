"""Owns reducing a JSON schema to a regular language where that is cheap. Pure; compiler threads.

Covers booleans, null, integers, numbers and plain strings without bounds on their value, enums, constants,
arrays, closed objects, and `anyOf` of these; anything else is `Unsupported` and stays with llguidance. It
agrees with llguidance to the last byte: tests walk both at random and compare every mask.
"""

from __future__ import annotations

import json
from typing import Any

from shared.grammars import WHITESPACE
from worker.constraints.regex_parse import EMPTY, Alt, Cat, Node, Repeat, Unsupported, literal, parse

_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "$schema", "$id", "$comment"))
_INTEGER = parse(r"-?(?:0|[1-9][0-9]*)")
_NUMBER = parse(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CHARACTER = parse(
    r"[^\x00-\x1f\"\\\x7f]|\\[\"\\bfnrt]"
)  # one spelling each, as `shared.grammars.ESCAPES` has it
_SPACE = parse(WHITESPACE)
_COMMA = Cat((_SPACE, literal(","), _SPACE))
_MAX_DEPTH = 16
_MAX_PROPERTIES = 24


def schema_tree(schema: Any) -> Node:
    """The schema's texts as a tree over bytes. Raises `Unsupported`."""
    return _value(schema, 0)


def _value(schema: Any, depth: int) -> Node:
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        raise Unsupported("not a plain schema")
    keys = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
    if "const" in keys:
        return _constants([keys.pop("const")], keys)
    if "enum" in keys:
        return _constants(keys.pop("enum"), keys)
    if "anyOf" in keys:
        parts = keys.pop("anyOf")
        if keys or not isinstance(parts, list) or not parts:
            raise Unsupported("anyOf beside other keywords")
        return Alt(tuple(_value(part, depth + 1) for part in parts))
    kind = keys.pop("type", None)
    if isinstance(kind, list):
        if keys or not kind:
            raise Unsupported("several types with bounds")
        return Alt(tuple(_value({"type": one}, depth + 1) for one in dict.fromkeys(kind)))
    if kind == "object":
        return _object(keys, depth)
    if kind == "array":
        return _array(keys, depth)
    if kind == "string":
        low, high = _bounds(keys, "minLength", "maxLength")
        return Cat((literal('"'), Repeat(_CHARACTER, low, high), literal('"')))
    if keys:
        raise Unsupported(f"{next(iter(keys))} of {kind}")
    if kind == "integer":
        return _INTEGER
    if kind == "number":
        return _NUMBER
    if kind == "boolean":
        return Alt((literal("true"), literal("false")))
    if kind == "null":
        return literal("null")
    raise Unsupported("a value of any type")


def _constants(values: Any, rest: dict[str, Any]) -> Node:
    kind = rest.pop("type", None)
    if rest or not isinstance(values, list) or not values:
        raise Unsupported("an enum beside other keywords")
    texts = []
    for value in values:
        if not isinstance(value, str):
            raise Unsupported("an enum of other things than texts")
        if kind not in (None, "string") or any(ord(char) < 32 or ord(char) == 127 for char in value):
            raise Unsupported("an enum with control characters")
        texts.append(literal(json.dumps(value, ensure_ascii=False)))
    return Alt(tuple(texts))


def _bounds(keys: dict[str, Any], low_name: str, high_name: str) -> tuple[int, int | None]:
    low, high = keys.pop(low_name, 0), keys.pop(high_name, None)
    if keys:
        raise Unsupported(next(iter(keys)))
    if type(low) is not int or low < 0 or not (high is None or (type(high) is int and high >= low)):
        raise Unsupported("bounds that are no counts")
    if max(low, high or 0) > 1000:
        raise Unsupported("long counts")
    return low, high


def _array(keys: dict[str, Any], depth: int) -> Node:
    item = _value(keys.pop("items", None), depth + 1)
    low, high = _bounds(keys, "minItems", "maxItems")
    if high == 0:
        return _enclosed("[", EMPTY, "]")
    more = Repeat(Cat((_COMMA, item)), max(0, low - 1), None if high is None else high - 1)
    items = Cat((item, more, _SPACE))
    return Cat((literal("["), _SPACE, items if low else Repeat(items, 0, 1), literal("]")))


def _object(keys: dict[str, Any], depth: int) -> Node:
    properties = keys.pop("properties", {})
    required = keys.pop("required", [])
    if keys.pop("additionalProperties", True) is not False or keys:
        raise Unsupported("an open object")
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise Unsupported("not a plain object")
    if any(name not in properties for name in required):
        raise Unsupported("a required property without a schema")
    if not properties:
        return _enclosed("{", EMPTY, "}")
    if len(properties) > _MAX_PROPERTIES:
        raise Unsupported("many properties")
    # From the last to the first: what may follow when members stand before it already, and when none does.
    after: Node = _SPACE
    first: Node = EMPTY
    for name, schema in reversed(properties.items()):
        if any(ord(char) < 32 or ord(char) == 127 for char in name):
            raise Unsupported("a name with control characters")
        key = literal(json.dumps(name, ensure_ascii=False))
        member = Cat((key, _SPACE, literal(":"), _SPACE, _value(schema, depth + 1)))
        opening, more = Cat((member, after)), Cat((_COMMA, member))
        if name in required:
            first, after = opening, Cat((more, after))
        else:
            first, after = Alt((opening, first)), Cat((Repeat(more, 0, 1), after))
    return Cat((literal("{"), _SPACE, first, literal("}")))


def _enclosed(opening: str, body: Node, closing: str) -> Node:
    return Cat((literal(opening), _SPACE, body, literal(closing)))
