"""What a schema is made into, and that answers drawn through its masks are valid by the client's own schema."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from gateway.confined.grammar_process import judge
from gateway.schemas.patterns import translate
from gateway.schemas.prepare import prepare
from gateway.schemas.width import MAX_WIDTH
from shared.grammars import GrammarError, spell
from shared.protocol import Grammar
from tests.corpus import _tokenizer, complaint, draw


def strictly(schema: Any) -> str:
    """The prepared schema. Raises `GrammarError` where it is refused."""
    answer = judge(Grammar("json_schema", json.dumps(schema)), _tokenizer())
    if answer.error:
        raise GrammarError(answer.error)
    return answer.source


def leniently(schema: dict[str, Any]) -> str:
    return strictly(schema | {"x-guidance": {"lenient": True}})


def accepts(source: str, text: str) -> bool:
    matcher = LLMatcher(_tokenizer(), spell(Grammar("json_schema", source)), log_level=0)
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and bool(matcher.is_accepting())


def answers_are_valid(schema: Any, source: str, *, seed: int = 0, num: int = 6) -> int:
    """Draw answers and validate them; how many were complete."""
    rng = random.Random(seed)
    complete = 0
    for _ in range(num):
        text, failed = draw(source, rng, 400)
        assert not failed, failed
        if text is not None:
            complete += 1
            assert not complaint(schema, text), (text, complaint(schema, text), source)
    return complete


KIND = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
X = {"properties": {"x": {"type": "integer"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        # Objects that another schema speaks of too are left open.
        (KIND | {"anyOf": [X]}, ['{"kind":"a","x":1}'], ['{"kind":"a"}', '{"kind":"a","x":"1"}']),
        (KIND | {"allOf": [X]}, ['{"kind":"a","x":1}'], ['{"kind":"a"}']),
        (KIND, ['{"kind":"a"}'], ['{"kind":"a","x":1}']),
        # A pattern holds for the decoded string, and a key is compared decoded.
        ({"type": "string", "pattern": '^[^"]+$'}, ['"a"', '"é🙂"'], ['"\\""', '"\\u0022"', '""']),
        ({"type": "string", "pattern": r"^[^\\]+$"}, ['"a"'], ['"\\\\"', '"\\u005c"']),
        ({"type": "string", "pattern": r"^\S+$"}, ['"a\\""'], ['"\\n"', '"a\\u0020"']),
        ({"type": "string", "pattern": r"^a[[&&b]$"}, ['"a["', '"a&"', '"ab"'], ['"aa"']),
        ({"type": "string", "pattern": r"^a{b}/\/$"}, ['"a{b}//"'], ['"ab//"']),
        (
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": True},
            ['{"a":true}', '{"b":1}'],
            ['{"\\u0061":1}', '{"a":1}'],
        ),
        # What constrains nothing is no reason to refuse.
        ({"type": "array", "uniqueItems": False, "items": {"type": "null"}}, ["[null,null]"], ["[1]"]),
        ({"type": "string", "format": "uuid4"}, ['"x"'], ["1"]),
        ({"type": "string", "format": "date"}, ['"2024-02-01"'], ['"x"']),
        ({"type": "number", "multipleOf": 0.07}, ["0.07", "0.21", "7"], ["0.08", "1"]),
        ({"type": "integer", "minimum": -9.7e26, "maximum": 9223372036854775807}, ["5", "-5"], ["1.5"]),
        ({"type": "number", "multipleOf": 0.01, "title": "t"}, ["0.29", "-3.5"], ["0.001"]),
        # Said otherwise.
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "dependencies": {"a": ["b"]}},
            ['{"a":1,"b":2}', '{"b":2}', "{}"],
            ['{"a":1}'],
        ),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
                "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
            },
            ['{"a":null}', '{"b":null}'],
            ['{"a":null,"b":null}', "{}"],
        ),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "not": {"required": ["a", "b"]}},
            ['{"a":1}', '{"b":1}', "{}"],
            ['{"a":1,"b":1}'],
        ),
        (
            {
                "type": "object",
                "properties": {"a": {}, "b": {"type": "integer"}},
                "if": {"required": ["a"]},
                "then": {"required": ["b"]},
                "else": {"properties": {"b": False}},
            },
            ['{"a":1,"b":1}', "{}"],
            ['{"a":1}', '{"b":1}'],
        ),
        (
            {"type": "object", "properties": {"a": {"type": "null"}}, "unevaluatedProperties": False},
            ['{"a":null}'],
            ['{"b":1}'],
        ),
        # Branches that exclude each other: by a constant, a type, a range, behind references.
        (
            {
                "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
                "$defs": {
                    "A": {"properties": {"k": {"const": "a"}}, "required": ["k"], "type": "object"},
                    "B": {"properties": {"k": {"const": "b"}, "n": {}}, "required": ["k"], "type": "object"},
                },
            },
            ['{"k":"a"}', '{"k":"b","n":1}'],
            ['{"k":"c"}', '{"k":"a","n":1}'],
        ),
        ({"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 5}]}, ["3", "7"], ["4"]),
        ({"oneOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}]}, ['"b"'], ['"c"']),
        # Schemas at places that JSON Schema does not know.
        (
            {"$ref": "#/components/X", "components": {"X": {"type": "string", "pattern": '^[^"]$', "x": 1}}},
            ['"a"'],
            ['"\\""'],
        ),
    ],
)  # fmt: skip
def test_what_is_allowed(schema: dict[str, Any], yes: list[str], no: list[str]) -> None:
    source = strictly(schema)
    for text in yes:
        assert accepts(source, text), (text, source)
    for text in no:
        assert not accepts(source, text), (text, source)
    answers_are_valid(schema, source)


OVERLAPPING = {
    "oneOf": [
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]},
    ]
}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (OVERLAPPING, "oneOf: an answer could match branch 1 and branch 2 at once. Use anyOf"),
        ({"$defs": {"x": OVERLAPPING}, "items": {"$ref": "#/$defs/x"}}, "oneOf: an answer could match"),
        ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 0}]}, "oneOf: an answer could match"),
        ({"oneOf": [{"maximum": 1e20}, {"exclusiveMinimum": 9007199254740992}], "type": "integer"}, "oneOf"),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "oneOf": [{"$ref": "#/definitions/x", "type": "null"}, {"$ref": "#/definitions/x", "type": "string"}],
                "definitions": {"x": {"type": ["null", "string"]}},
            },
            "oneOf",
        ),
        ({"oneOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]}, "oneOf"),
        ({"type": "string", "pattern": "^(?!a)b"}, "looks ahead"),
        ({"type": "string", "pattern": r"^(a)\1$"}, "refers back"),
        ({"type": "integer", "multipleOf": 1999993}, "at most 10000 remainders"),
        ({"const": 12345678901234567890}, "beyond ±2^53"),
        ({"minimum": 12345678901234567890}, "beyond ±2^53"),
        ({"const": "\u0001"}, "control character"),
        ({"type": "string", "pattern": r"^\cA$"}, "no text satisfies it"),
        ({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 3}, "could repeat"),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "uniqueItems"),
    ],
)  # fmt: skip
def test_refused_in_words_and_left_out_where_the_client_is_lenient(
    schema: dict[str, Any], words: str
) -> None:
    with pytest.raises(GrammarError, match=re.escape(words)):
        strictly(schema)
    assert leniently(schema)


def optional(num: int, before: int = 0) -> dict[str, Any]:
    """An object with so many optional properties behind a long constant."""
    properties: dict[str, Any] = {"z": {"const": "y" * before}} if before else {}
    properties |= {f"property{i}": {"type": "string"} for i in range(num)}
    return {"type": "object", "properties": properties, "required": ["z"] if before else []}


@pytest.mark.slow
def test_many_optional_properties_are_kept_to_the_end_or_refused_by_count() -> None:
    assert answers_are_valid(optional(130, 300), strictly(optional(130, 300)), num=3) > 0
    assert answers_are_valid(optional(MAX_WIDTH, 300), strictly(optional(MAX_WIDTH, 300)), num=2) > 0
    for schema in (
        optional(MAX_WIDTH + 1, 300),
        {"items": {"items": {"items": optional(MAX_WIDTH + 1)}}},
        {"anyOf": [optional(MAX_WIDTH // 2), {"items": {}, "type": "array"}, optional(MAX_WIDTH // 2)]},
    ):
        with pytest.raises(GrammarError, match=f"at most {MAX_WIDTH} optional properties"):
            strictly(schema)


@pytest.mark.parametrize(
    "pattern", [r"a\d\w\s[\d_]", r"[^a-c\w]\D\W\S", "x.y", r"[\]\-^]", r"\u{1F642}\uD83D\uDE42", "(?<n>a|b)+"]
)
def test_patterns_are_narrow_for_answers_and_wide_for_comparison(pattern: str) -> None:
    python = pattern.replace(r"\u{1F642}\uD83D\uDE42", "🙂🙂").replace("(?<n>", "(?P<n>")
    source = json.dumps({"type": "string", "pattern": translate(pattern), "maxLength": 8})
    rng = random.Random(1)
    for _ in range(8):
        text, failed = draw(source, rng, 200)
        assert not failed
        if text is not None:
            assert re.search(python, json.loads(text)), text


def test_deep_and_odd_schemas_are_refused_without_a_traceback() -> None:
    for source in (
        "[1]",
        '{"properties":3,"anyOf":"x"}',
        '{"items":{"$ref":"#/nothing"}}',
        '{"oneOf":{}}',
        '{"pattern":5}',
    ):
        answer = judge(Grammar("json_schema", source), _tokenizer())
        assert answer.error or answer.source
    with pytest.raises(GrammarError):
        prepare('{"items":' * 70 + "{}" + "}" * 70, lambda schema: False)


# ---------------------------------------------------------------------- schemas drawn at random

NAMES = st.sampled_from(["a", "b", 'q"', "é", "x-1", "A"])
PATTERNS = st.sampled_from(['^[^"]+$', "^[a-c]{1,3}$", r"\d", r"^\S*$", "^.$", r"^[^\\x]$", "a|b", r"^\W"])


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(NAMES, inner, min_size=1, max_size=3)},
        optional={
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": st.booleans() | inner,
            "patternProperties": st.dictionaries(PATTERNS, inner, min_size=1, max_size=1),
            "minProperties": st.integers(0, 2),
            "maxProperties": st.integers(0, 4),
            "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=1), max_size=1),
            "anyOf": st.lists(st.builds(lambda n: {"required": [n]}, NAMES), min_size=1, max_size=2),
            "oneOf": st.lists(st.builds(lambda n: {"required": [n]}, NAMES), min_size=2, max_size=2),
            "allOf": st.lists(inner, min_size=1, max_size=1),
        },
    )


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.fixed_dictionaries({"type": st.just("string")}, optional={"pattern": PATTERNS, "maxLength": st.integers(1, 5)}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={
            "minimum": st.integers(-3, 3), "maximum": st.integers(3, 9), "exclusiveMinimum": st.just(0),
            "multipleOf": st.sampled_from([2, 0.07, 0.5, 3]),
        },
    ),
    st.builds(lambda values: {"enum": values}, st.lists(st.sampled_from(["a", 'b"', 1, 2.5, None, True, [1]]), min_size=1, max_size=3)),
    st.builds(lambda value: {"const": value, "title": "t", "default": 3}, st.sampled_from(["a", 1, None, {"b": 1}])),
)  # fmt: skip


def _level(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        _objects(inner),
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner},
            optional={
                "minItems": st.integers(0, 2),
                "maxItems": st.integers(2, 3),
                "uniqueItems": st.just(False),
            },
        ),
        st.builds(lambda parts: {"anyOf": parts}, several),
        st.builds(lambda parts: {"oneOf": parts}, several),
        st.builds(lambda parts: {"allOf": parts}, several),
    )


SCHEMAS = st.recursive(LEAVES, _level, max_leaves=6)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(SCHEMAS, st.integers(0, 1000))
def test_what_is_accepted_strictly_is_valid_by_the_clients_own_schema(schema: Any, seed: int) -> None:
    try:
        source = strictly(schema)
    except GrammarError:
        return
    answers_are_valid(schema, source, seed=seed, num=3)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(SCHEMAS, st.integers(0, 1000))
def test_closing_forbids_no_schema_every_answer(schema: Any, seed: int) -> None:
    """What llguidance finds satisfiable as it was written is so when it was prepared."""
    open_source = json.dumps(schema)
    written = LLMatcher(_tokenizer(), spell(Grammar("json_schema", open_source)), log_level=0)
    if not written.is_error():
        try:
            strictly(schema)
        except GrammarError as error:
            assert "Unsatisfiable" not in str(error), str(error)
