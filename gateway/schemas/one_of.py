"""Owns `oneOf`: kept where its branches provably exclude each other, refused in words where an answer could match two. Pure.

Branches are compared as the client wrote them, before objects are closed: the client's validator knows nothing of that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from gateway.schemas.tree import Json, every, rebuild, target
from shared.grammars import GrammarError

IsEmpty = Callable[[Any], bool]
"""Whether nothing satisfies a schema, as far as a compiler can prove it."""

MAX_PAIRS: Final = 500  # of branches compared by compiling both at once
_KINDS: Final = frozenset(("null", "boolean", "number", "string", "array", "object"))


def decide(root: Any, wide: Any, is_empty: IsEmpty, *, lenient: bool) -> Any:
    """The schema with every `oneOf` said as `anyOf`. `wide` is the same schema with patterns read wide and without formats:
    what no reading lets overlap never overlaps. Raises `GrammarError` for branches that may."""
    judge = _Judge(wide, is_empty)
    twins: dict[int, Json] = {}
    if not lenient:
        twins = {id(one): other for one, other in zip(every(root), every(wide), strict=True)}

    def change(made: Json, original: Json) -> Json:
        branches = made.get("oneOf")
        if not isinstance(branches, list):
            return made
        if not lenient:
            judge.check(twins[id(original)])
        del made["oneOf"]
        if "anyOf" in made:
            made["allOf"] = [*made.get("allOf", []), {"anyOf": branches}]
        else:
            made["anyOf"] = branches
        return made

    return rebuild(root, change)


class _Judge:
    def __init__(self, root: Any, is_empty: IsEmpty) -> None:
        is_old = any(
            draft in str(root.get("$schema")) for draft in ("draft-03", "draft-04", "draft-06", "draft-07")
        )
        self.read = _references_alone if is_old else _as_it_is
        self.root = root = self.read(root)
        self.is_empty = is_empty
        self.num_pairs = 0
        refers_to_root = any(node.get("$ref") in ("#", "#/") for node in every(root))
        names = ("$schema", "$id", "$defs", "definitions")
        self.context = None if refers_to_root else {name: root[name] for name in names if name in root}

    def check(self, schema: Json) -> None:
        """Raises `GrammarError` when two branches of the schema's `oneOf` may overlap."""
        branches = [self.read(branch) for branch in schema["oneOf"]]
        beside = {key: value for key, value in schema.items() if key in ("type", "properties", "required")}
        for i, one in enumerate(branches):
            for j in range(i):
                if not (self.apart(one, branches[j], 0) or self.compile_apart(one, branches[j], beside)):
                    raise GrammarError(
                        f"oneOf: an answer could match branch {j + 1} and branch {i + 1} at once. Use anyOf, or give each branch "
                        'what the others exclude (a required property with a const of its own), or set "strict" to false'
                    )

    def compile_apart(self, one: Any, other: Any, beside: Json) -> bool:
        """Whether a compiler finds nothing that satisfies both."""
        self.num_pairs += 1
        if self.context is None or self.num_pairs > MAX_PAIRS:
            return False
        both = {**self.context, "allOf": [one, other]}
        if beside and self.is_empty({**both, "allOf": [beside, one, other]}):
            return True
        return self.is_empty(both)

    def apart(self, one: Any, other: Any, depth: int) -> bool:
        """Whether the two exclude each other by what can be read at once: types, constants, required properties."""
        if one is False or other is False:
            return True
        if depth > 6:
            return False
        one, other = self.resolve(one), self.resolve(other)
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return one is False or other is False
        if not _kinds(one) & _kinds(other):
            return True
        values, others = _values(one), _values(other)
        if values is not None and others is not None:
            return not values & others
        for mine, theirs in ((one, other), (other, one)):
            options = mine.get("anyOf")
            if isinstance(options, list) and all(self.apart(option, theirs, depth + 1) for option in options):
                return True
        if _kinds(one) & _kinds(other) != {"object"}:
            return False
        for name in {*_names(one), *_names(other)}:
            if self.apart(_property(one, name), _property(other, name), depth + 1):
                return True
        return False

    def resolve(self, schema: Any) -> Any:
        for _ in range(8):
            if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
                break
            found = target(self.root, schema["$ref"])
            if not isinstance(found, dict) or len(schema) > 1:
                break
            schema = found
        return schema


def _as_it_is(schema: Any) -> Any:
    return schema


def _references_alone(schema: Any) -> Any:
    """The schema as validators of older drafts read it: beside a `$ref` nothing counts."""

    def alone(made: Json, _: Json) -> Json:
        if "$ref" not in made:
            return made
        return {
            key: value
            for key, value in made.items()
            if key in ("$ref", "$schema", "$id", "$defs", "definitions")
        }

    return rebuild(schema, alone)


def _kinds(schema: Json) -> frozenset[str]:
    values = _values(schema)
    if values is not None:
        return frozenset(_kind_of(json.loads(value)) for value in values)
    named = schema.get("type")
    if named is None:
        return _KINDS
    listed = named if isinstance(named, list) else [named]
    return frozenset("number" if kind == "integer" else kind for kind in listed if isinstance(kind, str))


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int | float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


def _values(schema: Json) -> set[str] | None:
    """The only values a schema allows, each as canonical JSON."""
    if "const" in schema:
        values = [schema["const"]]
    elif isinstance(schema.get("enum"), list):
        values = schema["enum"]
    else:
        return None
    return {json.dumps(_plain(value), sort_keys=True) for value in values}


def _plain(value: Any) -> Any:
    """The value with 1.0 as 1: they are equal in JSON Schema."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value


def _names(schema: Json) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _property(schema: Json, name: str) -> Any:
    listed = schema.get("properties")
    if isinstance(listed, dict) and name in listed:
        return listed[name]
    if "patternProperties" in schema:
        return True
    return schema.get("additionalProperties", True)
