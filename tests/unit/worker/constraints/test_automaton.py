"""Token automata agree with what they replace: SpatialGrammar, and llguidance's masks on random walks."""

from __future__ import annotations

import json
import random
import re
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.grammars import ascii_classes
from shared.protocol import Grammar
from tests.unit.worker.constraints.spatial_grammar import SpatialGrammar
from worker.constraints.automaton import (
    REFUSED,
    TokenAutomaton,
    TokenBytes,
    TokenTables,
    choice_tables,
    sequence_tables,
    spatial_tables,
    text_tables,
)
from worker.constraints.constraint import Constraint
from worker.constraints.llg import Vocabulary, compile_llg
from worker.constraints.regex_dfa import build_dfa
from worker.constraints.regex_parse import Unsupported, parse
from worker.constraints.schema_tree import schema_tree
from worker.sim.tokenizer import SIM_TOKENIZER, VOCAB_SIZE
from worker.wire.compiler_process import automaton_for

SIM = Vocabulary(SIM_TOKENIZER, VOCAB_SIZE, [0])
SIM_BYTES = TokenBytes(SIM.token_bytes, SIM.end_ids)

PATTERNS = [
    "a|b",
    "[a-c]{2,4}x?",
    r"-?\d+(\.\d{1,2})?",
    "(ab|a)*b",
    ".{1,3}",
    "[^x]y",
    "é+|ü|[α-ω]{2}",
    r"^\w+@\w+\.(com|org)$",
    "(a|b)*a(a|b){5}",
    r"[\w.-]{1,20}",
    r"[^\s]*\S",
    r"\x41[\u00e9\]-]",
]


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: list[Any] = [
    {"type": "string"},
    {"type": "string", "minLength": 1, "maxLength": 2},
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean", "description": "yes or no"},
    {"type": ["integer", "null"]},
    {"enum": ["a/b", "é", 'q"']},
    {"anyOf": [{"type": "null"}, {"const": "x"}, {"type": "string"}]},
    {"type": "array", "items": {"type": "boolean"}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 3},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 0},
    closed(),
    closed(a={"type": "integer"}, b={"enum": ["x", "y"]}, ü={"type": "array", "items": {"type": "number"}}),
    closed(name={"type": "string"}, o=closed(k={"type": "null"})),
    closed(a={"type": "null"}, b={"type": "boolean"}, c={"type": "null"}) | {"required": []},
    closed(a={"type": "null"}, b={"type": "boolean"}, c={"type": "null"}) | {"required": ["b"]},
    closed(a={"type": "null"}, b={"type": "boolean"}, c={"type": "null"}) | {"required": ["a", "c"]},
]


def words_of(constraint: Constraint, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    words = np.full((vocab_size + 31) // 32, -1, np.int32)
    constraint.fill_mask(words)
    return words


def ids_of(words: np.ndarray[Any, np.dtype[np.int32]]) -> list[int]:
    ids: list[int] = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    return ids


def check_equal(grammar: Grammar, tables: TokenTables, *, walks: int = 12, steps: int = 30) -> None:
    """Same masks in every state of random walks, over single-byte tokens."""
    start = compile_llg(grammar, SIM)
    for seed in range(walks):
        rng = random.Random(seed)
        reference, automaton = start.fork(), TokenAutomaton(tables)
        for _ in range(steps):
            words = words_of(reference, VOCAB_SIZE)
            assert (words == words_of(automaton, VOCAB_SIZE)).all(), grammar
            assert reference.is_complete() == automaton.is_complete()
            token_id = rng.choice(ids_of(words))
            reference.advance(token_id)
            automaton.advance(token_id)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regex_equals_llguidance(pattern: str) -> None:
    check_equal(Grammar("regex", pattern), text_tables(parse(ascii_classes(pattern)), SIM_BYTES))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_schema_equals_llguidance(schema: Any) -> None:
    check_equal(Grammar("json_schema", json.dumps(schema)), text_tables(schema_tree(schema), SIM_BYTES))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=6))
def test_choices_equal_llguidance(choices: list[str]) -> None:
    grammar = Grammar("choice", json.dumps(choices))
    check_equal(grammar, choice_tables(choices, SIM_BYTES), walks=3, steps=12)


@settings(deadline=None, max_examples=60)
@given(st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", "é", r"\."]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{1,}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
), st.text("abé.0\n", max_size=6))  # fmt: skip
def test_automaton_accepts_what_pythons_re_matches(pattern: str, text: str) -> None:
    dfa = build_dfa(parse(ascii_classes(pattern)))
    state = 0
    for byte in text.encode():
        state = int(dfa.next_state[state, byte])
        if state < 0:
            break
    accepted = state >= 0 and bool(dfa.accepts[state])
    assert accepted == bool(re.fullmatch(pattern, text, re.ASCII))


def test_over_a_real_vocabulary_only_forced_spellings_differ() -> None:
    """Where the text is forced llguidance also forces its tokenisation; the automaton allows any. Every token
    it allows is one llguidance accepts, and no token llguidance allows is missing."""
    data = (files("worker") / "pocket" / "weights" / "tokenizer.json").read_bytes()
    size = max(json.loads(data)["model"]["vocab"].values()) + 1
    vocabulary = Vocabulary(data, size, [0])
    tokens = TokenBytes(vocabulary.token_bytes, [0])
    grammars = [Grammar("regex", pattern) for pattern in PATTERNS]
    grammars += [Grammar("json_schema", json.dumps(schema)) for schema in SCHEMAS]
    grammars += [Grammar("choice", json.dumps(["yes", "no", "maybe", "a boat", "a ball"]))]
    for grammar in grammars:
        start, tables = compile_llg(grammar, vocabulary), automaton_for(grammar, tokens)
        for seed in range(4):
            rng = random.Random(seed)
            reference, automaton = start.fork(), TokenAutomaton(tables)
            for _ in range(20):
                narrow = set(ids_of(words_of(reference, size)))
                wide = set(ids_of(words_of(automaton, size)))
                assert narrow <= wide, grammar
                for token_id in wide - narrow:
                    assert reference.matcher.validate_tokens([token_id]) == 1, (grammar, token_id)
                token_id = rng.choice(sorted(wide))
                reference.advance(token_id)
                automaton.advance(token_id)


@pytest.mark.parametrize("with_size", [False, True])
@pytest.mark.parametrize("max_objects", [0, 1, 3, 50])
def test_spatial_automaton_equals_the_grammar(with_size: bool, max_objects: int) -> None:
    ids = {"coord_id": 5, "size_id": 6, "end_id": 0, "with_size": with_size, "max_objects": max_objects}
    tables = spatial_tables(**ids, vocab_size=97)
    for seed in range(20):
        rng = random.Random(seed)
        grammar, automaton = SpatialGrammar(**ids), TokenAutomaton(tables)  # type: ignore[arg-type]
        for _ in range(200):
            words = words_of(grammar, 97)
            assert (words == words_of(automaton, 97)).all()
            assert grammar.is_complete() == automaton.is_complete()
            allowed = ids_of(words)
            token_id = 0 if 0 in allowed and rng.random() < 0.05 else allowed[0]
            grammar.advance(token_id)
            automaton.advance(token_id)
            for wrong in {0, 5, 6, 50} - set(ids_of(words_of(grammar, 97))):
                for constraint in (grammar, automaton.fork()):
                    with pytest.raises(ValueError):
                        constraint.advance(wrong)


def test_sequences_of_ids() -> None:
    tables = sequence_tables([[20, 21], [20, 30, 31], [40]], [0, 1], 64)
    automaton = TokenAutomaton(tables)
    assert ids_of(words_of(automaton, 64)) == [20, 40]
    automaton.advance(20)
    assert ids_of(words_of(automaton, 64)) == [21, 30]
    automaton.advance(21)
    assert automaton.is_complete() and ids_of(words_of(automaton, 64)) == [0, 1]
    for end_id in (1, 0, 0):
        automaton.advance(end_id)
        assert automaton.is_complete() and ids_of(words_of(automaton, 64)) == [0, 1]
    assert automaton.state == tables.end


def test_tables_agree_with_themselves() -> None:
    """Masks are exactly the classes a state has a way out of, and class 0 has none."""
    for schema in SCHEMAS:
        tables = text_tables(schema_tree(schema), SIM_BYTES)
        assert (tables.next_state[:, 0] == REFUSED).all()
        for state in range(tables.num_states):
            mask = ids_of(tables.masks[tables.mask_of[state]])
            follows = np.flatnonzero(tables.next_state[state, tables.class_of] != REFUSED).tolist()
            assert mask == follows and mask, "a state without a way out"


@pytest.mark.parametrize(
    "pattern",
    [r"(?i)a", r"\bx", "(?=a)b", r"\p{L}", "a{2000}b{2000}", "(a|b)*a(a|b){20}", "[[:alpha:]]", "a{3", "(", r"[\D]"],
)  # fmt: skip
def test_what_is_not_covered_is_left_to_llguidance(pattern: str) -> None:
    with pytest.raises(Unsupported):
        text_tables(parse(ascii_classes(pattern)), SIM_BYTES)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "object"},
        {"type": "object", "properties": {"a": {"type": "null"}}},
        {"type": "integer", "minimum": 3},
        {"type": "string", "format": "date"},
        {"$ref": "#"},
        {"enum": [1, "a"]},
        {"type": "array"},
    ],
)
def test_schemas_that_stay_with_llguidance(schema: Any) -> None:
    with pytest.raises(Unsupported):
        schema_tree(schema)
