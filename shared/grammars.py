"""Owns how a `Grammar` of the protocol is spelled for llguidance, and the bounds on its size. Any process.

The gateway checks a grammar and the worker compiles it: both read this one spelling, so what was checked is
what runs.
"""

from __future__ import annotations

import json
from typing import Any, Final

from shared.protocol import Grammar

KINDS: Final = ("json_schema", "json_object", "regex", "choice", "lark")
MAX_SOURCE_BYTES: Final = 64 << 10
MAX_SCHEMA_BYTES: Final = 256 << 10  # of a JSON schema, its annotations not counted
MAX_WRITTEN_BYTES: Final = 2 << 20  # of a JSON schema with everything that comes with it
MAX_CHOICES: Final = 2048
MAX_GRAMMAR_BYTES: Final = 24 << 20  # of memory, compiled and tried
MAX_REPEATS: Final = 100_000  # what a pattern's counted repeats may expand to, nested ones multiplied
MAX_DEPTH: Final = 64

LIMITS: Final[dict[str, Any]] = {
    "max_items_in_row": 3_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 12_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""llguidance's limits for schemas, expressions and choices. A schema's own bound (`gateway.schemas.width`) and the trials are
well within them, so that what was accepted does not fail in the middle of an answer."""

LARK_LIMITS: Final[dict[str, Any]] = LIMITS | {"max_items_in_row": 2_000, "step_max_items": 2_000}
"""For Lark, whose ambiguity may grow with the answer: a token is taken in about a millisecond, which decoding waits for."""

ESCAPES: Final = 'nrbtf\\"'
"""What may stand behind a backslash in JSON's strings: one spelling a character, so that keys and patterns are kept decoded."""

WHITESPACE: Final = "[ ]?"
"""White space between JSON's tokens: one space or none. Unbounded space is where small models loop for ever."""

_DIGIT, _WORD, _SPACE = "0-9", "A-Za-z0-9_", r" \t\n\r\f\v"
_ASCII_SETS: Final = {"d": _DIGIT, "w": _WORD, "s": _SPACE}


class GrammarError(ValueError):
    """A grammar that cannot be used; the message is for its sender."""


def limits_of(grammar: Grammar, *, running: bool = False) -> dict[str, Any]:
    """llguidance's limits for a grammar of this kind; while an answer is made, four times what it was accepted by, since nested
    alternatives take more the deeper an answer is."""
    if grammar.kind == "lark":
        return LARK_LIMITS
    if running:
        return LIMITS | {name: 4 * LIMITS[name] for name in ("max_items_in_row", "step_max_items")}
    return LIMITS


def reason(text: str) -> str:
    """llguidance's own words without its state dump, on one line and short enough for a message."""
    words = " ".join(text.split("<state>", 1)[0].replace("<non-verbose/>", "").split())[:300]
    return "no text satisfies it" if words == "NoExtensionBias" else words


def spell(grammar: Grammar) -> str:
    """The grammar in llguidance's own JSON, which llguidance may still refuse. Raises `GrammarError`."""
    try:
        num_bytes = len(grammar.source.encode())
    except UnicodeEncodeError:
        raise GrammarError("the grammar holds half a surrogate pair") from None
    kind, source = grammar.kind, grammar.source
    most = MAX_WRITTEN_BYTES if kind == "json_schema" else MAX_SOURCE_BYTES
    if num_bytes > most:
        raise GrammarError(f"a grammar may have at most {most} bytes")
    if kind == "json_object":
        return _spell_schema({"type": "object"}, lenient=False)
    if kind == "json_schema":
        schema, lenient = read_schema(source)
        return _spell_schema(schema, lenient=lenient)
    if kind == "regex":
        return _spell_lark(f"start: /{_in_slashes(ascii_classes(source))}/")
    if kind == "choice":
        # One terminal, hence one automaton: a rule for each would be parsed one by one.
        texts = map(_in_quotes, read_choices(source))
        return _spell_lark("start: CHOICE\nCHOICE: " + " | ".join(texts))
    if kind == "lark":
        return _spell_lark(source)
    raise GrammarError(f"{kind!r} is not one of {', '.join(KINDS)}")


def read_schema(source: str) -> tuple[Any, bool]:
    """A JSON schema, and whether keywords that are not supported may be ignored. Raises `GrammarError`."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {str(error)[:200]}") from None
    if not isinstance(schema, dict | bool):
        raise GrammarError("a schema is a JSON object")
    lenient = False
    if isinstance(schema, dict):
        options = schema.pop("x-guidance", None)
        lenient = isinstance(options, dict) and options.get("lenient") is True
    level: list[Any] = [schema] if isinstance(schema, dict) else []
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                pattern = node.get("pattern")
                if isinstance(pattern, str):
                    check_repeats(pattern)
                below.extend(node.values())
            else:
                below.extend(node)
        level = [node for node in below if isinstance(node, dict | list)]
    if not level:
        return schema, lenient
    raise GrammarError(f"a schema may be nested at most {MAX_DEPTH} levels deep")


def read_choices(source: str) -> list[str]:
    """The texts of a choice grammar, a JSON list. Raises `GrammarError`."""
    try:
        choices = json.loads(source)
    except (ValueError, RecursionError):
        raise GrammarError("the choices are not a JSON list") from None
    if not isinstance(choices, list) or not choices:
        raise GrammarError("at least one choice is needed")
    if len(choices) > MAX_CHOICES:
        raise GrammarError(f"at most {MAX_CHOICES} choices are accepted")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise GrammarError("every choice is a text of at least one character")
    return list(dict.fromkeys(choices))


def ascii_classes(pattern: str) -> str:
    r"""The pattern with \d, \w and \s written out as ASCII sets, and its repeats checked.

    In Rust's syntax \d would allow every script's digits, which nobody who asks for a number means.
    """
    check_repeats(pattern)
    out: list[str] = []
    in_set, at = False, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\" and at + 1 < len(pattern):
            name = pattern[at + 1]
            chars = _ASCII_SETS.get(name.lower())
            if chars is None or (in_set and name.isupper()):
                out.append(char + name)
            elif in_set:
                out.append(chars)
            else:
                out.append(f"[^{chars}]" if name.isupper() else f"[{chars}]")
            at += 2
            continue
        if char == "[":
            in_set = True
        elif char == "]":
            in_set = False
        out.append(char)
        at += 1
    return "".join(out)


def check_repeats(pattern: str) -> None:
    """Refuse patterns whose counted repeats expand to too much. Raises `GrammarError`.

    A rough count, enough to find bombs such as (a{1,1000}){1,1000}: an atom weighs one, a repeat multiplies.
    """
    groups = [0]
    last, at = 0, 0  # weight of the atom just read
    while at < len(pattern):
        char = pattern[at]
        if char == "{":
            end = pattern.find("}", at)
            low, _, high = pattern[at + 1 : end].partition(",") if end > 0 else ("", "", "")
            counts = [int(count) for count in (low, high) if count.isdecimal() and len(count) < 8]
            times = max([1, *counts])
            if any(len(count) >= 8 for count in (low, high)) and end > 0:
                raise GrammarError(f"{pattern[at : at + 20]}: a repeat count is too large")
            groups[-1] += last * (times - 1)
            last *= times
            at = end + 1 if end > 0 else at + 1
        elif char == "(":
            groups.append(0)
            if len(groups) > 250:
                raise GrammarError("groups are nested too deeply")
            at += 1
        elif char == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
            at += 1
        else:
            if char == "[":
                end = pattern.find("]", at + 2)
                at = end if end > 0 else at
            elif char == "\\":
                at += 1
            last = 1
            groups[-1] += char not in "|*+?"
            at += 1
        if groups[-1] > MAX_REPEATS:
            raise GrammarError(f"the pattern's repeats expand to more than {MAX_REPEATS} characters")


def _in_quotes(text: str) -> str:
    """The text as it stands between Lark's quotes, where control characters of any kind are escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(
        char if char.isprintable() or ord(char) > 0xFFFF else f"\\u{ord(char):04x}" for char in quoted
    )


def _in_slashes(pattern: str) -> str:
    """The pattern as it stands between Lark's slashes."""
    out: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\" and at + 1 < len(pattern):
            out.append(pattern[at : at + 2])
            at += 2
            continue
        out.append({"/": "\\/", "\n": "\\n", "\r": "\\r"}.get(char, char))
        at += 1
    return "".join(out)


def _spell_lark(lark: str) -> str:
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": lark}]})


def _spell_schema(schema: Any, *, lenient: bool) -> str:
    options = {"whitespace_pattern": WHITESPACE, "lenient": lenient, "json_allowed_escapes": ESCAPES}
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return json.dumps({"grammars": [{"name": "start", "json_schema": {**schema, "x-guidance": options}}]})
