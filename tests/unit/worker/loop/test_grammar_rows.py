"""Constrained rows in the loop: host masks and device automata agree, and no row disturbs another (I9, I10)."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from shared.errors import ErrorCode, FinishReason
from shared.protocol import Grammar, Sampling
from tests.unit.worker.loop.simulation import Simulation, Stream
from worker.constraints.automaton import TokenAutomaton, TokenBytes
from worker.constraints.constraint import Constraint
from worker.constraints.llg import LlgConstraint, Vocabulary, compile_llg
from worker.loop.inbox import CompiledSubmit
from worker.sim.runner import fake_card
from worker.sim.tokenizer import FIRST_BYTE_ID, SIM_TOKENIZER, VOCAB_SIZE
from worker.wire.compiler_process import automaton_for

CARD = fake_card(vocab_size=VOCAB_SIZE)
VOCABULARY = Vocabulary(SIM_TOKENIZER, VOCAB_SIZE, [0])
BYTES = TokenBytes(VOCABULARY.token_bytes, [0])
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"enum": ["ab", "cd"]}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar("regex", r"[a-f]{3,9}-\d{2}"),
    Grammar("json_schema", json.dumps(SCHEMA)),
    Grammar("choice", '["red","green","blue"]'),
]


class CountingConstraint:
    """Passes everything on, and keeps what it was told."""

    def __init__(self, inner: LlgConstraint) -> None:
        self.inner = inner
        self.taken: list[int] = []

    def fill_mask(self, words: object) -> None:
        self.inner.fill_mask(words)  # type: ignore[arg-type]

    def advance(self, token_id: int) -> None:
        self.taken.append(token_id)
        self.inner.advance(token_id)

    def is_complete(self) -> bool:
        return self.inner.is_complete()


def simulation(**options: Any) -> Simulation:
    return Simulation(card=CARD, max_rows=6, num_pages=128, **options)


def prompt_of(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(30, VOCAB_SIZE) for _ in range(3 + number % 5)]


def text_of(stream: Stream) -> str:
    return bytes(token_id - FIRST_BYTE_ID for token_id in stream.tokens).decode()


def run_constrained(kind: str, **options: object) -> list[list[int]]:
    """The same nine requests with host matchers, host automata or device automata."""
    sim = simulation(automata=kind == "device", **options)
    streams = []
    for number in range(9):
        grammar = GRAMMARS[number % 3]
        constraint: Constraint
        if kind == "matcher":
            constraint = compile_llg(grammar, VOCABULARY)
        else:
            constraint = TokenAutomaton(automaton_for(grammar, BYTES))
        sampling = Sampling(temperature=1.0, seed=number) if number % 2 else Sampling()
        streams.append(
            sim.submit(prompt_of(number), 24, sampling=sampling, grammar=grammar, constraint=constraint)
        )
    sim.run()
    sim.check_at_rest()
    for stream in streams:
        assert stream.finish is not None and stream.finish.reason in (FinishReason.STOP, FinishReason.LENGTH)
    return [stream.tokens for stream in streams]


@pytest.mark.parametrize("depth", [1, 2])
def test_matchers_and_automata_choose_the_same_tokens(depth: int) -> None:
    matcher = run_constrained("matcher", depth=depth)
    assert matcher == run_constrained("host", depth=depth) == run_constrained("device", depth=depth)
    assert matcher == run_constrained("matcher", depth=1, late_launch=False)


@pytest.mark.parametrize("kind", ["matcher", "device"])
def test_preemption_resumes_with_the_same_state(kind: str) -> None:
    """Pages so few that rows are preempted and resumed: their constraints go on where they were."""
    plenty = run_constrained(kind)
    sim_options = {"num_slots": 2, "page_tokens": 2}
    sim = Simulation(card=CARD, max_rows=6, num_pages=24, automata=kind == "device", **sim_options)
    streams = []
    for number in range(9):
        grammar = GRAMMARS[number % 3]
        constraint: Constraint = (
            compile_llg(grammar, VOCABULARY)
            if kind == "matcher"
            else TokenAutomaton(automaton_for(grammar, BYTES))
        )
        sampling = Sampling(temperature=1.0, seed=number) if number % 2 else Sampling()
        streams.append(
            sim.submit(prompt_of(number), 24, sampling=sampling, grammar=grammar, constraint=constraint)
        )
    sim.run()
    sim.check_at_rest()
    assert sim.scheduler.num_preemptions > 0, "the test preempts nothing"
    assert [stream.tokens for stream in streams] == plenty


@pytest.mark.parametrize("kind", ["matcher", "device"])
def test_constrained_rows_leave_the_others_tokens_alone(kind: str) -> None:
    def run(with_constrained: bool) -> list[list[int]]:
        sim = simulation(automata=kind == "device", prefix_cache=False)
        plain = []
        for number in range(6):
            if with_constrained:
                grammar = GRAMMARS[number % 3]
                constraint: Constraint = (
                    compile_llg(grammar, VOCABULARY)
                    if kind == "matcher"
                    else TokenAutomaton(automaton_for(grammar, BYTES))
                )
                sim.submit(prompt_of(50 + number), 20, grammar=grammar, constraint=constraint)
            sampling = Sampling(temperature=0.7, seed=number) if number % 2 else Sampling()
            plain.append(sim.submit(prompt_of(number), 15, sampling=sampling))
        sim.run()
        sim.check_at_rest()
        return [stream.tokens for stream in plain]

    assert run(True) == run(False)


def test_every_token_advances_its_constraint_once() -> None:
    sim = simulation(num_slots=3, depth=3)
    constraints = [CountingConstraint(compile_llg(GRAMMARS[i % 3], VOCABULARY)) for i in range(8)]
    streams = [
        sim.submit(prompt_of(i), 20, grammar=GRAMMARS[i % 3], constraint=constraint)
        for i, constraint in enumerate(constraints)
    ]
    sim.run()
    for stream, constraint in zip(streams, constraints, strict=True):
        assert stream.finish is not None
        # A grammar that is complete ends its stream without a step for the end token.
        end = [0] if len(constraint.taken) > len(stream.tokens) else []
        assert constraint.taken == stream.tokens + end
        assert not end or stream.finish.reason is FinishReason.STOP


def test_outputs_follow_their_grammar() -> None:
    sim = simulation()
    grammar = GRAMMARS[1]
    streams = [
        sim.submit(prompt_of(i), 60, grammar=grammar, constraint=compile_llg(grammar, VOCABULARY))
        for i in range(6)
    ]
    sim.run()
    ended = [s for s in streams if s.finish is not None and s.finish.reason is FinishReason.STOP]
    assert ended
    for stream in ended:
        value = json.loads(text_of(stream))
        assert list(value) == ["n", "s"] and type(value["n"]) is int and value["s"] in ("ab", "cd")


def test_a_grammar_that_can_never_finish_ends_at_max_tokens() -> None:
    sim = simulation()
    grammar = Grammar("lark", 'start: ("a" | "b") start')
    stream = sim.submit([40], 25, grammar=grammar, constraint=compile_llg(grammar, VOCABULARY))
    sim.run()
    assert stream.finish is not None and stream.finish.reason is FinishReason.LENGTH
    assert len(text_of(stream)) == 25 and set(text_of(stream)) <= set("ab")


def test_a_grammar_that_grows_beyond_its_limits_ends_its_own_row_only() -> None:
    rules = "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60))
    hostile = Grammar("lark", f'start: a0\n{rules}\na60: "x"')
    alone = simulation()
    expected = alone.submit(prompt_of(1), 12)
    alone.run()
    sim = simulation()
    plain = sim.submit(prompt_of(1), 12)
    bad = sim.submit(prompt_of(2), 12, grammar=hostile, constraint=compile_llg(hostile, VOCABULARY))
    good = sim.submit(prompt_of(3), 12, grammar=GRAMMARS[2], constraint=compile_llg(GRAMMARS[2], VOCABULARY))
    sim.run()
    sim.check_at_rest()
    assert bad.finish is not None and bad.finish.code is ErrorCode.INVALID_GRAMMAR
    assert plain.tokens == expected.tokens
    assert text_of(good) in ("red", "green", "blue")


def test_a_complete_grammar_ends_even_an_answer_that_ignores_ends() -> None:
    sim = simulation()
    grammar = Grammar("choice", '["red"]')
    stream = sim.submit([40], 8, grammar=grammar, constraint=compile_llg(grammar, VOCABULARY))
    command = sim.inbox.get()
    assert isinstance(command, CompiledSubmit)
    message = msgspec.structs.replace(command.message, ignore_eos=True)
    sim.inbox.put(replace(command, message=message))
    sim.run()
    assert stream.finish is not None and stream.finish.reason is FinishReason.STOP
    assert stream.tokens == [FIRST_BYTE_ID + byte for byte in b"red"]


@pytest.mark.parametrize(("field", "sampling", "task"), [("min_tokens", Sampling(min_tokens=2), "text"), ("response_format", None, "detect")])  # fmt: skip
def test_combinations_without_a_meaning_are_refused(field: str, sampling: Sampling | None, task: str) -> None:
    sim = simulation()
    constraint = compile_llg(GRAMMARS[2], VOCABULARY)
    stream = sim.submit([40], 8, sampling=sampling, task=task, grammar=GRAMMARS[2], constraint=constraint)
    plain = sim.submit([40], 8, grammar=GRAMMARS[2])
    sim.run()
    assert stream.rejected is not None and stream.rejected.param == field
    assert plain.rejected is not None and plain.rejected.code is ErrorCode.UNSUPPORTED
