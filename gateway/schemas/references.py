"""Owns bringing schemas that stand where JSON Schema knows none, but are referred to, to where it does: below `$defs`. Pure."""

from __future__ import annotations

from typing import Any

from gateway.schemas.tree import Json, every, rebuild, target


def gather(root: Json) -> Json:
    """The schema with every target of a reference within it at a place where schemas stand."""
    known = {id(node) for node in every(root)}
    moved: dict[str, str] = {}  # reference → where its target stands now
    found: Json = {}
    level: list[Json] = list(every(root))
    defined = root.get("$defs")
    taken: Json = defined if isinstance(defined, dict) else {}
    while level:
        ref = level.pop().get("$ref")
        if not isinstance(ref, str) or ref in moved:
            continue
        schema = target(root, ref)
        if not isinstance(schema, dict) or id(schema) in known:
            continue
        name = f"moved{len(moved)}"
        while name in taken:
            name += "_"
        found[name] = schema
        moved[ref] = f"#/$defs/{name}"
        for node in every(schema):
            known.add(id(node))
            level.append(node)
    if not moved:
        return root

    def point(made: Json, _: Json) -> Json:
        ref = made.get("$ref")
        if isinstance(ref, str) and ref in moved:
            made["$ref"] = moved[ref]
        return made

    made: Any = rebuild({**root, "$defs": {**taken, **found}}, point)
    return dict(made)
