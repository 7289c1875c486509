"""Owns judging untrusted grammars: a process of its own with bounded memory, reading jobs from stdin.

Started by `gateway.confined.grammars` as `python -m gateway.confined.grammar_process <memory bytes>`; it holds no sockets and no
secrets, and is killed when a job takes too long. A job is a `Grammar`, its answer an `Answer`.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from shared.confined import read, run_confined, write
from shared.grammars import GrammarError, spell
from shared.protocol import Grammar

if TYPE_CHECKING:  # imported where it is used: the gateway shares these messages and loads no compiler
    from llguidance import LLTokenizer

TRIAL_STEPS: Final = 48


class Answer(msgspec.Struct, array_like=True):
    """Why the grammar is refused, or the source to send to the worker."""

    error: str = ""
    source: str = ""


def judge(grammar: Grammar, tokenizer: LLTokenizer) -> Answer:
    """Compile over plain bytes and take a few steps: many grammars exceed llguidance's limits only in the first steps."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        if grammar.kind == "lark":
            try:
                grammar = msgspec.structs.replace(grammar, source=any_to_lark(grammar.source))
            except Exception as error:  # the converter from GBNF raises many kinds
                raise GrammarError(f"it is neither Lark nor GBNF: {error}") from None
        matcher = LLMatcher(tokenizer, spell(grammar), log_level=0)
    except GrammarError as error:
        return Answer(str(error))
    rng = random.Random(0)
    for _ in range(TRIAL_STEPS):
        words = int.from_bytes(matcher.compute_bitmask(), "little") if not matcher.is_error() else 0
        allowed = [i for i in range(tokenizer.vocab_size) if words >> i & 1 and i != tokenizer.eos_token]
        if not allowed or not matcher.consume_token(rng.choice(allowed)):
            break
    if matcher.is_error():
        text = matcher.get_error().split("<state>", 1)[0].replace("<non-verbose/>", "")
        return Answer(" ".join(text.split())[:300] or "it exceeds the compiler's limits")
    return Answer("", grammar.source)


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer grammars until stdin ends."""
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    decode = msgspec.msgpack.Decoder(Grammar).decode
    while message := read(stdin):
        grammar = decode(message[0])
        try:
            answer = judge(grammar, tokenizer)
        except MemoryError:
            answer = Answer("compiling it takes more memory than allowed")
        write(stdout, msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    run_confined(serve)
