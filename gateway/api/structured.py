"""Owns reading the constraint on an answer's form, which clients ask for under many names. Gateway's loop."""

from __future__ import annotations

import operator
from typing import Any, Final

import msgspec

from gateway.api.parameters import Json, ResponseFormat, SamplingFields, invalid
from gateway.generation import Core
from shared.grammars import MAX_CHOICES, MAX_SOURCE_BYTES, MAX_WRITTEN_BYTES
from shared.protocol import Grammar

Wanted = tuple[Grammar, str]
"""A constraint, and the name of the field that holds it."""

_KINDS: Final = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}

_FIELDS: Final = ("response_format", "structured_outputs", *(f"guided_{name}" for name in _KINDS))
_NOTHING: Final = (None,) * len(_FIELDS)
_asked = operator.attrgetter(*_FIELDS)


async def grammar(
    core: Core, fields: SamplingFields, more: Wanted | None = None, *, tenant: str = ""
) -> Grammar | None:
    """The constraint a body asks for, checked by compiling it. Raises `RequestError` naming the field."""
    found = _wanted(fields)
    if more is not None:
        found.append(more)
    if not found:
        return None
    if len(found) > 1:
        raise invalid(f"{found[0][1]} asks for another form already; give one of them", found[1][1])
    (asked, param) = found[0]
    if fields.min_tokens:
        raise invalid(f"does not go with {param}: a finished answer could not end", "min_tokens")
    return await core.check_grammar(asked, param=param, tenant=tenant)


def format_grammar(asked: ResponseFormat | None) -> Wanted | None:
    """What `response_format` asks for. Raises `RequestError`."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        if asked.schema is not None:
            return schema_grammar(asked.schema, "response_format.schema", strict=asked.strict)
        return Grammar("json_object", "{}"), "response_format"
    param = "response_format.json_schema.schema"
    wanted = asked.json_schema
    if wanted is None or wanted.schema is None:
        raise invalid("json_schema needs a schema", param)
    return schema_grammar(wanted.schema, param, strict=wanted.strict)


def schema_grammar(schema: Json, param: str, *, strict: bool | None) -> Wanted:
    """A JSON schema, as the client wrote it. Raises `RequestError`.

    Objects that list their properties have no others (see `gateway.schemas`). Where `strict` is false, they may, and keywords
    that cannot be kept are left out of the constraint instead of refused.
    """
    options = {"x-guidance": {"lenient": True}} if strict is False else {}
    text = msgspec.json.encode({key: value for key, value in schema.items() if key != "x-guidance"} | options)
    if len(text) > MAX_WRITTEN_BYTES:
        raise invalid(f"a schema may have at most {MAX_WRITTEN_BYTES} bytes, annotations included", param)
    return Grammar("json_schema", text.decode()), param


def _wanted(fields: SamplingFields) -> list[Wanted]:
    """Every constraint of a body with the field that asked for it, in the order of these fields."""
    if _asked(fields) == _NOTHING:
        return []
    found: list[Wanted] = []
    asked = format_grammar(fields.response_format)
    if asked is not None:
        found.append(asked)
    for name in _KINDS:
        value = getattr(fields, f"guided_{name}")
        if value is not None:
            found.append(constraint(name, value, f"guided_{name}"))
    outputs = fields.structured_outputs
    if outputs is not None:
        for name in _KINDS:
            value = getattr(outputs, name)
            if value is not None:
                found.append(constraint(name, value, f"structured_outputs.{name}"))
        if outputs.json_object:
            found.append((Grammar("json_object", "{}"), "structured_outputs.json_object"))
        if not found:
            raise invalid(
                "one of json, json_object, regex, choice and grammar is needed", "structured_outputs"
            )
    return found


def constraint(name: str, value: Any, param: str) -> Wanted:
    """The constraint that `name` (json, regex, choice or grammar) means, within bounds. Raises `RequestError`."""
    if name == "json":
        if isinstance(value, str):
            try:
                value = msgspec.json.decode(value, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeError, RecursionError):
                raise invalid("a JSON schema is a JSON object", param) from None
        return schema_grammar(value, param, strict=True)
    if name == "choice":
        if not value or len(value) > MAX_CHOICES or not all(value):
            raise invalid(f"between 1 and {MAX_CHOICES} texts of at least one character", param)
        value = msgspec.json.encode(value).decode()
    if not value:
        raise invalid("it is empty", param)
    if len(value.encode()) > MAX_SOURCE_BYTES:
        raise invalid(f"at most {MAX_SOURCE_BYTES} bytes are accepted", param)
    return Grammar(_KINDS[name], value), param
