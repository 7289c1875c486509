"""Owns compiling grammars in a process of its own with bounded memory, which reads jobs from stdin.

Started by `worker.wire.compiler` as `python -m worker.wire.compiler_process <memory bytes>` and killed when a job takes
too long. Building an automaton is Python code; in the worker it would hold the decode thread's lock for milliseconds.
"""

from __future__ import annotations

from typing import BinaryIO

import msgspec
import numpy as np
from llguidance import LLMatcher

from shared.confined import read, run_confined, write
from shared.grammars import ascii_classes, read_choices, read_schema
from shared.protocol import Grammar
from worker.constraints.automaton import TokenBytes, TokenTables, choice_tables, text_tables
from worker.constraints.llg import Vocabulary, compile_llg
from worker.constraints.regex_parse import Unsupported, parse
from worker.constraints.schema_tree import schema_tree

TRIAL_STEPS = 32


class Setup(msgspec.Struct, array_like=True):
    """First message: the vocabulary."""

    tokenizer_json: bytes
    vocab_size: int
    end_ids: list[int]


class Table(msgspec.Struct, array_like=True):
    """One int32 array."""

    shape: list[int]
    data: bytes


class Answer(msgspec.Struct, array_like=True):
    """The answer to a grammar: why it is refused, or its automaton, or neither, if llguidance has to run it."""

    error: str = ""
    tables: list[Table] = []
    end: int = 0


def automaton_for(grammar: Grammar, tokens: TokenBytes) -> TokenTables:
    """The grammar as an automaton. Raises `Unsupported` for those that are not regular, or too large."""
    if grammar.kind == "regex":
        return text_tables(parse(ascii_classes(grammar.source)), tokens)
    if grammar.kind == "choice":
        return choice_tables(read_choices(grammar.source), tokens)
    if grammar.kind == "json_schema":
        return text_tables(schema_tree(read_schema(grammar.source)[0]), tokens)
    raise Unsupported(grammar.kind)


def answer(grammar: Grammar, vocabulary: Vocabulary, tokens: TokenBytes) -> Answer:
    """Compile with llguidance and as an automaton; a few steps find grammars whose masks exceed llguidance's limits."""
    try:
        constraint = compile_llg(grammar, vocabulary)
        try:
            tables = automaton_for(grammar, tokens)
        except Unsupported:
            _walk(constraint.matcher, vocabulary)
            constraint.check()
            return Answer()
    except ValueError as error:
        return Answer(str(error) or "the grammar cannot be compiled")
    arrays = (tables.next_state, tables.class_of, tables.mask_of, tables.masks)
    return Answer("", [Table(list(array.shape), array.tobytes()) for array in arrays], tables.end)


def _walk(matcher: LLMatcher, vocabulary: Vocabulary) -> None:
    words = np.zeros((vocabulary.vocab_size + 31) // 32, np.int32)
    rng = np.random.default_rng(0)
    for _ in range(TRIAL_STEPS):
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            return
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if not len(allowed):
            return
        token_id = int(allowed[rng.integers(len(allowed))])
        if token_id in vocabulary.end_ids or not matcher.consume_token(token_id):
            return


def tables_of(answer: Answer) -> TokenTables:
    """The token tables of an automaton that came over the pipe."""
    arrays = [np.frombuffer(table.data, np.int32).reshape(table.shape).copy() for table in answer.tables]
    return TokenTables(arrays[0], arrays[1], arrays[2], arrays[3], answer.end)


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer grammars until stdin ends."""
    first = read(stdin)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first[0], type=Setup)
    vocabulary = Vocabulary(setup.tokenizer_json, setup.vocab_size, setup.end_ids)
    tokens = TokenBytes(vocabulary.token_bytes, setup.end_ids)
    write(stdout, msgspec.msgpack.encode(Answer()))
    decode = msgspec.msgpack.Decoder(Grammar).decode
    while message := read(stdin):
        try:
            said = answer(decode(message[0]), vocabulary, tokens)
        except MemoryError:
            said = Answer("compiling the grammar takes more memory than allowed")
        write(stdout, msgspec.msgpack.encode(said))


if __name__ == "__main__":
    run_confined(serve)
