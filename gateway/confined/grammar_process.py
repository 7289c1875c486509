"""Owns judging untrusted grammars: a process of its own with bounded memory, which forks for each job it reads from stdin.

Started by `gateway.confined.compilers` as `python -m gateway.confined.grammar_process <memory bytes>`; it holds no sockets
and no secrets. A job's body is a `Grammar`, its answer an `Answer`.
"""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from gateway.schemas.prepare import prepare, simpler
from shared.confined import run_confined
from shared.forked_jobs import bytes_in_use, serve_forked
from shared.grammars import ESCAPES, MAX_GRAMMAR_BYTES, WHITESPACE, GrammarError, limits_of, reason, spell
from shared.protocol import Grammar
from shared.trials import Trial

if TYPE_CHECKING:  # imported where it is used: the gateway shares these messages and loads no compiler
    from llguidance import LLTokenizer


class Answer(msgspec.Struct, array_like=True):
    """Why the grammar is refused, or the source to send to the worker."""

    error: str = ""
    source: str = ""


def judge(grammar: Grammar, tokenizer: LLTokenizer) -> Answer:
    """Prepare, compile over plain bytes and take some steps: many grammars exceed llguidance's limits only then."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        if grammar.kind == "lark":
            try:
                grammar = msgspec.structs.replace(grammar, source=any_to_lark(grammar.source))
            except Exception as error:  # the converter from GBNF raises many kinds
                raise GrammarError(f"it is neither Lark nor GBNF: {error}") from None
        if grammar.kind != "json_schema":
            why = _try(grammar, tokenizer)
            return Answer(why, "" if why else grammar.source)
        source = prepare(grammar.source, lambda schema: _is_empty(schema, tokenizer))
        why = _try(Grammar("json_schema", source), tokenizer)
        if why:
            for other in simpler(source):  # lenient: what cannot be kept is left out
                if not _try(Grammar("json_schema", other), tokenizer):
                    return Answer("", other)
        return Answer(why, "" if why else source)
    except GrammarError as error:
        return Answer(str(error))


def _try(grammar: Grammar, tokenizer: LLTokenizer) -> str:
    """Why the grammar is refused, or ""."""
    from llguidance import LLMatcher, LLParserLimits

    before = bytes_in_use()
    matcher = LLMatcher(tokenizer, spell(grammar), log_level=0, limits=LLParserLimits(**limits_of(grammar)))
    if not matcher.is_error():
        Trial(matcher, (tokenizer.eos_token,), lambda text: tokenizer.tokenize_bytes(text)).run()
    error = ""
    if matcher.is_error():
        error = reason(matcher.get_error()) or "it exceeds the compiler's limits"
    elif bytes_in_use() - before > MAX_GRAMMAR_BYTES:
        error = f"compiled it takes more than {MAX_GRAMMAR_BYTES >> 20} MiB"
    return error


def _is_empty(schema: Any, tokenizer: LLTokenizer) -> bool:
    """Whether llguidance proves that nothing satisfies the schema."""
    from llguidance import LLMatcher

    options = {"whitespace_pattern": WHITESPACE, "lenient": False, "json_allowed_escapes": ESCAPES}
    source = json.dumps({"grammars": [{"name": "start", "json_schema": {**schema, "x-guidance": options}}]})
    matcher = LLMatcher(tokenizer, source, log_level=0)
    return matcher.is_error() and "Unsatisfiable schema" in matcher.get_error()[:2000]


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer grammars until stdin ends."""
    from llguidance import LLTokenizer
    from llguidance.gbnf_to_lark import any_to_lark as _any_to_lark  # noqa: F401  loaded before the forks

    tokenizer = LLTokenizer("byte")
    judge(Grammar("json_object", "{}"), tokenizer)
    decode = msgspec.msgpack.Decoder(Grammar).decode

    def work(body: bytes) -> bytes:
        try:
            answer = judge(decode(body), tokenizer)
        except MemoryError:
            answer = Answer("compiling it takes more memory than allowed")
        except RecursionError:
            answer = Answer("it is nested too deeply")
        return msgspec.msgpack.encode(answer)

    gc.freeze()
    serve_forked(stdin, stdout, work)


if __name__ == "__main__":
    run_confined(serve)
