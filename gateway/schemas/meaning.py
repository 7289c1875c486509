"""Owns what of a schema constrains an answer: annotations, defaults and what holds of every value are taken out. Pure.

What is left is what counts in the size limit, and what is compiled. Whatever cannot be kept is refused in words, or, where
the client is lenient, left out.
"""

from __future__ import annotations

import re
from decimal import Decimal
from math import gcd
from typing import Any, Final

from gateway.schemas.patterns import translate
from gateway.schemas.tree import Json, rebuild
from shared.grammars import GrammarError

FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
"""Formats that are kept. Any other is an annotation, as JSON Schema has it."""
_CONSTRAINTS: Final = frozenset(
    (
        "$schema", "$id", "id", "$anchor", "$ref", "$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor",
        "$defs", "definitions", "anyOf", "oneOf", "allOf", "not", "if", "then", "else", "const", "enum", "type",
        "items", "additionalItems", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains",
        "maxContains", "unevaluatedItems", "properties", "additionalProperties", "patternProperties", "required",
        "minProperties", "maxProperties", "propertyNames", "dependencies", "dependentRequired", "dependentSchemas",
        "unevaluatedProperties", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
        "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    )
)  # fmt: skip
_COUNTS: Final = (
    "minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains", "maxContains",
)  # fmt: skip
_NUMBERS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_DROPPED_WHEN_EMPTY: Final = (
    "required",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "patternProperties",
    "allOf",
)
_EXACT: Final = 1 << 53  # whole numbers up to here are the same in every reader of JSON
MAX_MULTIPLE: Final = 10_000  # remainders an automaton has to tell apart
_CONTROL: Final = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")
_OLD_DRAFTS: Final = ("draft-03", "draft-04", "draft-06", "draft-07", "2019-09")


def constraints_of(root: Any, *, lenient: bool, wide: bool = False) -> Any:
    """The schema without what constrains nothing; `wide`: with patterns read wide, and no formats. Raises `GrammarError`."""
    is_old = isinstance(root, dict) and any(draft in str(root.get("$schema")) for draft in _OLD_DRAFTS)

    def clean(made: Json, _: Json) -> Json:
        kept = {key: value for key, value in made.items() if key in _CONSTRAINTS}
        _drop_idle(kept, is_old)
        if wide:
            kept.pop("format", None)
        for key in _COUNTS:
            if key in kept:
                kept[key] = _count(kept[key])
        for name in ("pattern", "multipleOf"):
            if name in kept:
                try:
                    if name == "multipleOf":
                        _keep_multiple(kept)
                    else:
                        kept[name] = _pattern(kept[name], wide)
                except GrammarError:
                    if not lenient:
                        raise
                    del kept[name]
        if isinstance(kept.get("patternProperties"), dict):
            try:
                kept["patternProperties"] = _patterned(kept)
            except GrammarError:
                if not lenient:
                    raise
                del kept["patternProperties"]
                kept.pop("additionalProperties", None)  # it spoke of the properties that no pattern matches
        _clamp(kept, wide)
        for key in (*_NUMBERS, "const", "enum"):
            why = _unspeakable(kept[key]) if key in kept else ""
            if why and not lenient:
                raise GrammarError(f"{key} has {why}")
            if why:
                del kept[key]
        if not lenient:
            _check_least(kept)
        return kept

    return rebuild(root, clean)


def _drop_idle(kept: Json, is_old: bool) -> None:
    """Take out what holds of every value."""
    if kept.get("uniqueItems") is False:
        del kept["uniqueItems"]
    most = kept.get("maxItems")
    if kept.get("uniqueItems") is True and isinstance(most, int) and most <= 1:
        del kept["uniqueItems"]
    if isinstance(kept.get("format"), str) and kept["format"] not in FORMATS:
        del kept["format"]
    for key in _DROPPED_WHEN_EMPTY:
        if key in kept and kept[key] in ([], {}):
            del kept[key]
    if "if" not in kept:
        kept.pop("then", None)
        kept.pop("else", None)
    elif "then" not in kept and "else" not in kept:
        del kept["if"]
    if "contains" not in kept or (kept.get("minContains") == 0 and "maxContains" not in kept):
        for key in ("contains", "minContains", "maxContains"):
            kept.pop(key, None)
    for key in ("propertyNames", "unevaluatedProperties", "unevaluatedItems", "additionalItems"):
        if kept.get(key) is True or kept.get(key) == {}:
            del kept[key]
    if kept.get("not") is False:
        del kept["not"]
    if "prefixItems" in kept and not is_old:
        kept.pop(
            "additionalItems", None
        )  # a keyword of older drafts, by which llguidance would forget the prefix


def _patterned(kept: Json) -> Json:
    """`patternProperties` by patterns that hold in every reading. A name that matches in one reading only is left out of a closed
    object; in an open one it keeps to the pattern's schema and to that of other names. Raises `GrammarError`."""
    others = kept.get("additionalProperties", True)
    made: Json = {}
    for name, part in kept["patternProperties"].items():
        narrow, broad = translate(name), translate(name, wide=True)
        if narrow == broad or others is False:
            made[narrow] = part
        elif others is True or others == {}:
            made[broad] = part
        else:
            made[broad] = {"allOf": [part, others]}
    return made


def _count(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():  # 2.0 is a count too
        return int(value)
    return value


def _pattern(value: Any, wide: bool) -> Any:
    return translate(value, wide=wide) if isinstance(value, str) else value


def _keep_multiple(kept: Json) -> None:
    """`multipleOf` as llguidance reads it exactly. Raises `GrammarError`."""
    value = kept["multipleOf"]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e15:
        raise GrammarError(f"multipleOf is {value!r}; a number above 0 is needed")
    exact = Decimal(repr(value)).normalize()
    digits = int(Decimal((0, exact.as_tuple().digits, max(0, int(exact.as_tuple().exponent)))))
    if digits > MAX_MULTIPLE:
        raise GrammarError(f"multipleOf {value!r}: at most {MAX_MULTIPLE} remainders can be told apart")
    if _survives(value):
        return
    # llguidance scales a float by tens until it is whole, and 0.07 never is. A multiple of two parts of it, whose shares have
    # no factor in common, is a multiple of the whole.
    shares = sorted(
        {2**twos * 5**fives * more for twos in range(9) for fives in range(5) for more in (1, digits)}
    )
    parts = [(share, float(exact / share)) for share in shares if exact / share * share == exact]
    parts = [
        (share, part) for share, part in parts if Decimal(repr(part)) == exact / share and _survives(part)
    ]
    for i, (share, part) in enumerate(parts):
        for other_share, other in parts[:i]:
            if gcd(share, other_share) == 1:
                del kept["multipleOf"]
                kept["allOf"] = [*kept.get("allOf", []), {"multipleOf": part}, {"multipleOf": other}]
                return
    raise GrammarError(f"multipleOf {value!r} has too many digits")


def _survives(value: float) -> bool:
    """Whether llguidance reads this number as what it says."""
    scaled, tens = float(value), 0
    while not scaled.is_integer() and tens < 20:
        scaled, tens = scaled * 10, tens + 1
    return scaled <= 0xFFFFFFFF and Decimal(int(scaled)).scaleb(-tens) == Decimal(repr(value))


def _clamp(kept: Json, wide: bool) -> None:
    """Bounds beyond ±2^53 at ±2^53: readers of JSON round what lies beyond, and an automaton of its digits is large."""
    for key, most in (
        ("maximum", _EXACT),
        ("exclusiveMaximum", _EXACT),
        ("minimum", -_EXACT),
        ("exclusiveMinimum", -_EXACT),
    ):
        value = kept.get(key)
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (value > most) == (most > 0)
            and value != most
        ):
            if wide:
                del kept[key]
            else:
                kept[key] = most


def _unspeakable(value: Any) -> str:
    """What of a constant no answer can say to the letter; "" for nothing."""
    level = [value]
    while level:
        node = level.pop()
        if isinstance(node, dict):
            level += [*node, *node.values()]
        elif isinstance(node, list):
            level += node
        elif isinstance(node, int) and not isinstance(node, bool) and abs(node) > _EXACT:
            return "a number beyond ±2^53, which readers of JSON round"
        elif isinstance(node, str) and _CONTROL.search(node):
            return "a control character, which answers do not spell"
    return ""


def _check_least(kept: Json) -> None:
    """Names that are not listed may come twice in an answer, and count once. Raises `GrammarError`."""
    least, needed = kept.get("minProperties"), kept.get("required", [])
    is_open = "patternProperties" in kept or kept.get("additionalProperties") is not False
    if is_open and isinstance(least, int) and isinstance(needed, list) and least > len(needed) + 1:
        raise GrammarError(
            "minProperties above 1 needs names that are required: names that are not listed could repeat"
        )
