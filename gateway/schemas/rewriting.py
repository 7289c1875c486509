"""Owns saying a schema in keywords that can be kept: the same texts are valid before and after. Pure.

`dependencies`, `if` over required names, `not` and `oneOf` over required names, and `unevaluatedProperties` where nothing is
left unevaluated but what `properties` does not list.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Final

from gateway.schemas.tree import IN_PLACE, Json, rebuild

_MAX_WAYS: Final = 64


def rewrite(root: Any) -> Any:
    """The schema with what can be said otherwise said otherwise."""
    return rebuild(root, _rewrite)


def _rewrite(made: Json, _original: Json) -> Json:
    _depend(made)
    _unevaluated(made)
    _exclude(made)
    _choose(made)
    _condition(made)
    return made


def _also(made: Json, schema: Json) -> None:
    made["allOf"] = [*made.get("allOf", []), schema]


def _depend(made: Json) -> None:
    """If a property is there, others are, or a schema holds: it is absent, or they are and it does."""
    for key in ("dependencies", "dependentRequired", "dependentSchemas"):
        needs = made.get(key)
        if not isinstance(needs, dict):
            continue
        del made[key]
        for name, need in needs.items():
            then = {"required": list(need)} if isinstance(need, list) else need
            if then is not True and then != {}:
                _also(made, {"anyOf": [_without(name), then]})


def _without(name: str) -> Json:
    return {"properties": {name: False}}


def _unevaluated(made: Json) -> None:
    if "unevaluatedProperties" not in made or not {*IN_PLACE, "patternProperties"}.isdisjoint(made):
        return
    if "additionalProperties" not in made:
        made["additionalProperties"] = made["unevaluatedProperties"]
    del made["unevaluatedProperties"]  # beside additionalProperties everything is evaluated


def _exclude(made: Json) -> None:
    """`not` over required names: an object lacks one of them."""
    needed = _required_only(made.get("not"))
    if needed is None or made.get("type") != "object" or not needed:
        return
    del made["not"]
    _also(made, {"anyOf": [_without(name) for name in needed]} if len(needed) > 1 else _without(needed[0]))


def _choose(made: Json) -> None:
    """`oneOf` over required names: those of one branch are there, and of every other branch one is missing."""
    branches = made.get("oneOf")
    if not isinstance(branches, list) or len(branches) < 2:
        return
    needed = [_required_only(branch) for branch in branches]
    ways: list[Json] = []
    for mine in needed:
        if mine is None:
            return
        others = [[name for name in other or [] if name not in mine] for other in needed if other is not mine]
        count = 1
        for other in others:
            count *= len(other)
        if count + len(ways) > _MAX_WAYS:
            return
        # None where another branch asks for nothing more: this one never holds alone.
        ways += [
            {"type": "object", "required": mine, "properties": dict.fromkeys(missing, False)}
            for missing in product(*others)
        ]
    if not ways:
        return
    del made["oneOf"]  # what is no object matches every branch, so none of them
    _also(made, {"anyOf": ways})


def _condition(made: Json) -> None:
    """`if` over required names: they are there and `then` holds, or one is missing and `else` does."""
    needed = _required_only(made.get("if"))
    if not needed or made.get("type") != "object":
        return
    then, otherwise = made.pop("then", True), made.pop("else", True)
    del made["if"]
    ways: list[Json] = [{"required": needed, "allOf": [then]}]
    ways += [{"properties": {name: False}, "allOf": [otherwise]} for name in needed]
    _also(made, {"anyOf": ways})


def _required_only(schema: Any) -> list[str] | None:
    """The names a schema requires, if it says nothing else about objects."""
    if not isinstance(schema, dict) or not set(schema) <= {"required", "type"}:
        return None
    if schema.get("type", "object") != "object":
        return None
    names = schema.get("required")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return list(dict.fromkeys(names))
