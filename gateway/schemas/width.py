"""Owns a bound on what a schema's masks cost, known before anything is compiled. Pure.

At one place of an answer a parser keeps every property and every alternative that may begin there. An object with hundreds of
optional properties exceeds the parser's limits only when an answer reaches it, so it is refused by count.
"""

from __future__ import annotations

from typing import Any, Final

from gateway.schemas.tree import Json, every, target
from shared.grammars import GrammarError

MAX_WIDTH: Final = 400
_DEEP: Final = 12


def check_width(root: Any) -> None:
    """Raises `GrammarError` where more than `MAX_WIDTH` optional properties and alternatives may stand at one place."""
    widths: dict[int, int] = {}
    for node in every(root):
        if _width(node, root, widths, 0) > MAX_WIDTH:
            raise GrammarError(
                f"at one place of an answer at most {MAX_WIDTH} optional properties may follow, those of all alternatives "
                "of an anyOf counted; require some of them, or divide the object"
            )


def _width(schema: Any, root: Any, widths: dict[int, int], depth: int) -> int:
    if not isinstance(schema, dict) or depth > _DEEP:
        return 1
    known = widths.get(id(schema))
    if known is not None:
        return known
    widths[id(schema)] = 1  # a reference to itself adds nothing
    listed = schema.get("properties")
    needed = schema.get("required")
    names = set(listed) if isinstance(listed, dict) else set()
    required = [one for one in needed if isinstance(one, str)] if isinstance(needed, list) else []
    optional = len(names.difference(required))
    total = max(1, optional)
    ref = schema.get("$ref")
    if isinstance(ref, str):
        total += _width(target(root, ref), root, widths, depth + 1) - 1
    for part in _list(schema, "allOf"):
        total += _width(part, root, widths, depth + 1) - 1
    alternatives = [_width(part, root, widths, depth + 1) for part in _list(schema, "anyOf")]
    if alternatives:
        total = (
            sum(total - 1 + width for width in alternatives) if optional else total - 1 + sum(alternatives)
        )
    widths[id(schema)] = total
    return total


def _list(schema: Json, key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []
