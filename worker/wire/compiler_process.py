"""Owns compiling grammars in a process of its own with bounded memory, which forks for each job it reads from stdin.

Started by `worker.wire.compile_child` as `python -m worker.wire.compiler_process <memory bytes>`. Building an automaton is
Python code; in the worker it would hold the decode thread's lock for milliseconds.
"""

from __future__ import annotations

import gc
from typing import BinaryIO

import msgspec
import numpy as np

from shared.confined import read, run_confined, write
from shared.forked_jobs import bytes_in_use, serve_forked
from shared.grammars import MAX_GRAMMAR_BYTES, ascii_classes, read_choices, read_schema
from shared.protocol import Grammar
from shared.trials import Trial
from worker.constraints.automaton import TokenBytes, TokenTables, choice_tables, text_tables
from worker.constraints.llg import Vocabulary, compile_llg
from worker.constraints.regex_parse import Unsupported, parse
from worker.constraints.schema_tree import schema_tree


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
    """The answer to a grammar: why it is refused, or its automaton, or neither, if llguidance has to run it, and the memory it
    takes, as measured here."""

    error: str = ""
    tables: list[Table] = []
    end: int = 0
    num_bytes: int = 0


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
    """Compile with llguidance and as an automaton; some steps find grammars whose masks exceed llguidance's limits."""
    before = bytes_in_use()
    try:
        constraint = compile_llg(grammar, vocabulary, running=False)
        num_bytes = max(0, bytes_in_use() - before)
        tables: TokenTables | None
        try:
            tables = automaton_for(grammar, tokens)
        except Unsupported:
            tables = None
        if tables is None:
            gc.collect()
            started_bytes = bytes_in_use()
            Trial(constraint.matcher, vocabulary.end_ids, vocabulary.tokenizer.tokenize_bytes).run()
            constraint.check()
            num_bytes += max(0, bytes_in_use() - started_bytes)
            if num_bytes > MAX_GRAMMAR_BYTES:
                return Answer(f"compiled it takes more than {MAX_GRAMMAR_BYTES >> 20} MiB")
            return Answer(num_bytes=num_bytes)
    except ValueError as error:
        return Answer(str(error) or "the grammar cannot be compiled")
    arrays = (tables.next_state, tables.class_of, tables.mask_of, tables.masks)
    return Answer(
        "", [Table(list(array.shape), array.tobytes()) for array in arrays], tables.end, tables.num_bytes
    )


def tables_of(answer: Answer) -> TokenTables:
    """The token tables of an automaton that came over the pipe."""
    arrays = [np.frombuffer(table.data, np.int32).reshape(table.shape).copy() for table in answer.tables]
    return TokenTables(arrays[0], arrays[1], arrays[2], arrays[3], answer.end)


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer grammars until stdin ends."""
    first = read(stdin)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first[1], type=Setup)
    vocabulary = Vocabulary(setup.tokenizer_json, setup.vocab_size, setup.end_ids)
    tokens = TokenBytes(vocabulary.token_bytes, setup.end_ids)
    decode = msgspec.msgpack.Decoder(Grammar).decode

    def work(body: bytes) -> bytes:
        try:
            said = answer(decode(body), vocabulary, tokens)
        except MemoryError:
            said = Answer("compiling the grammar takes more memory than allowed")
        return msgspec.msgpack.encode(said)

    work(
        msgspec.msgpack.encode(Grammar("json_object", "{}"))
    )  # what is loaded when first used is loaded before the forks
    gc.freeze()
    write(stdout, b"")
    serve_forked(stdin, stdout, work)


if __name__ == "__main__":
    run_confined(serve)
