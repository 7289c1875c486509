"""Owns what a JSON schema is made into before it is compiled: what constrains nothing is out, the rest said so that it can be
kept, objects closed where that is sound. Runs in the confined process. Pure, but for the compiler it is given to ask.
"""

from __future__ import annotations

import json
from typing import Any, Final

from gateway.schemas.closing import close_objects
from gateway.schemas.meaning import constraints_of
from gateway.schemas.one_of import IsEmpty, decide
from gateway.schemas.references import gather
from gateway.schemas.rewriting import rewrite
from gateway.schemas.tree import Json, every, rebuild
from gateway.schemas.width import check_width
from shared.grammars import MAX_SCHEMA_BYTES, GrammarError, read_schema

LENIENT: Final = {"x-guidance": {"lenient": True}}
_PLAIN: Final = frozenset(
    (
        "type",
        "properties",
        "required",
        "items",
        "enum",
        "const",
        "anyOf",
        "$ref",
        "$defs",
        "definitions",
        "$schema",
        "$id",
    )
)


def prepare(source: str, is_empty: IsEmpty) -> str:
    """The source as a worker takes it. Raises `GrammarError`."""
    root, lenient = read_schema(source)
    if not isinstance(root, dict):
        return source
    root = gather(root)
    made = constraints_of(root, lenient=lenient)
    num_bytes = len(
        json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    )
    if num_bytes > MAX_SCHEMA_BYTES:
        raise GrammarError(f"a schema may have at most {MAX_SCHEMA_BYTES} bytes, annotations not counted")
    made = rewrite(made)
    if any("oneOf" in node for node in every(made)):
        wide = made if lenient else rewrite(constraints_of(root, lenient=False, wide=True))
        made = decide(made, wide, is_empty, lenient=lenient)
    if not lenient:
        made = close_objects(made)
        check_width(made)
    return _written(made, lenient)


def simpler(prepared: str) -> list[str]:
    """What is left of a lenient schema that does not compile, the closest first."""
    root, lenient = read_schema(prepared)
    if not (lenient and isinstance(root, dict)):
        return []
    no_bounds = rebuild(
        root,
        lambda made, _: _without(
            made,
            (
                "pattern",
                "format",
                "multipleOf",
                "patternProperties",
                "minLength",
                "maxLength",
                "minItems",
                "maxItems",
            ),
        ),
    )
    plain = rebuild(root, lambda made, _: {key: value for key, value in made.items() if key in _PLAIN})
    kind = root.get("type")
    shape = {"type": kind} if isinstance(kind, str | list) else {}
    return [_written(schema, lenient=True) for schema in (no_bounds, plain, shape)]


def _without(made: Json, keys: tuple[str, ...]) -> Json:
    if "patternProperties" in made and "patternProperties" in keys:
        made.pop("additionalProperties", None)
    return {key: value for key, value in made.items() if key not in keys}


def _written(schema: Any, lenient: bool) -> str:
    if lenient and isinstance(schema, dict):
        schema = schema | LENIENT
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
