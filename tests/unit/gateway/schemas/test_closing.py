"""Objects of JSON schemas closed: which are, and that nothing is allowed which was not before."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.schemas.closing import close_objects

NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
CLOSED_NAME = NAME | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (NAME, CLOSED_NAME),
        ({"properties": {"a": NAME}}, {"properties": {"a": CLOSED_NAME}, "additionalProperties": False}),
        ({"type": "array", "items": NAME}, {"type": "array", "items": CLOSED_NAME}),
        ({"anyOf": [NAME, {"type": "null"}]}, {"anyOf": [CLOSED_NAME, {"type": "null"}]}),
        ({"prefixItems": [NAME], "items": False}, {"prefixItems": [CLOSED_NAME], "items": False}),
        # As pydantic writes a model inside a model.
        (
            {"$defs": {"N": NAME}, "properties": {"n": {"$ref": "#/$defs/N"}}, "title": "T"},
            {
                "$defs": {"N": CLOSED_NAME},
                "properties": {"n": {"$ref": "#/$defs/N"}},
                "title": "T",
                "additionalProperties": False,
            },
        ),
        # A schema that says nothing of the object's properties stands beside it.
        (
            {"items": {"allOf": [NAME]}, "properties": {"a": {"type": "string"}}},
            {
                "items": {"allOf": [NAME]},
                "properties": {"a": {"type": "string"}},
                "additionalProperties": False,
            },
        ),
        # Of a map, its values.
        ({"additionalProperties": NAME}, {"additionalProperties": CLOSED_NAME}),
        # Properties may be called anything.
        (
            {"properties": {"allOf": NAME, "properties": {"type": "string"}}},
            {
                "properties": {"allOf": CLOSED_NAME, "properties": {"type": "string"}},
                "additionalProperties": False,
            },
        ),
    ],
)
def test_closed(schema: dict[str, Any], closed: dict[str, Any]) -> None:
    before = repr(schema)
    assert close_objects(schema) == closed
    assert repr(schema) == before, "the caller's schema is left alone"
    assert close_objects(closed) == closed


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}},
        NAME | {"additionalProperties": True},
        NAME | {"additionalProperties": {"type": "integer"}},
        NAME | {"required": ["name", "other"]},  # closed, nothing would satisfy it
        NAME | {"patternProperties": {"^x": {}}},
        {"allOf": [NAME, {"properties": {"age": {"type": "integer"}}}]},
        {"items": {"allOf": [NAME]}},
        NAME | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        NAME | {"$ref": "#/$defs/More"},
        NAME | {"anyOf": [{"properties": {"x": {"type": "integer"}}, "required": ["x"]}]},
        NAME | {"dependentRequired": {"name": ["other"]}},
        NAME | {"minProperties": 2},
        # A definition that is one part of another object somewhere is closed nowhere.
        {
            "$defs": {"N": NAME, "M": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}},
            "items": {"$ref": "#/$defs/N"},
            "contains": {"allOf": [{"$ref": "#/$defs/M"}, {"required": ["age"]}]},
        },
        {"not": NAME},
        {"properties": "not an object", "anyOf": "nor a list", "$defs": 3},
    ],
)
def test_left_as_it_is(schema: dict[str, Any]) -> None:
    assert close_objects(schema) == schema
