"""Owns constraints compiled by llguidance: JSON schemas, regexes, choices, Lark. State follows the sequence (I9).

Compiled on the compiler's threads, then advanced and asked for masks by the decode thread. llguidance never
raises for a bad grammar or token: a matcher turns into an error that stays, which is read here and raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from shared.grammars import GrammarError, limits_of, reason, spell
from shared.protocol import Grammar
from worker.constraints.constraint import Constraint

I32 = npt.NDArray[np.int32]

MaskExecutor = LLExecutor

_REFUSED = "doesn't satisfy the grammar"


class Vocabulary:
    """A tokenizer as constraints see it: llguidance's trie, the bytes of each id, and the ids that end."""

    def __init__(self, tokenizer_json: bytes, vocab_size: int, end_ids: Sequence[int]) -> None:
        """Raises ValueError for a tokenizer llguidance cannot read."""
        if not end_ids:
            raise ValueError("the model has no end token")
        self.vocab_size = vocab_size
        self.end_ids = tuple(end_ids)
        self.tokenizer = LLTokenizer(
            tokenizer_json.decode(), n_vocab=vocab_size, eos_token=[int(token_id) for token_id in end_ids]
        )
        self._token_bytes: list[bytes] | None = None

    @property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; b"" for special ids, which no text constraint allows."""
        if self._token_bytes is None:
            decode, is_special = self.tokenizer.decode_bytes, self.tokenizer.is_special_token
            self._token_bytes = [b"" if is_special(i) else decode([i]) for i in range(self.vocab_size)]
        return self._token_bytes


class LlgConstraint:
    """One sequence's matcher."""

    __slots__ = ("_end_ids", "matcher")

    def __init__(self, matcher: LLMatcher, end_ids: tuple[int, ...]) -> None:
        self.matcher = matcher
        self._end_ids = end_ids

    def fill_mask(self, words: I32) -> None:
        self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self.check()

    def advance(self, token_id: int) -> None:
        matcher = self.matcher
        if matcher.is_stopped():  # the end state: end ids may be sampled again and again
            self.check()
            if token_id not in self._end_ids:
                raise ValueError(f"token {token_id} after the end of the grammar")
        elif not matcher.consume_token(token_id) and _REFUSED in matcher.get_error():
            self.check()  # any other failure is the grammar's: the next mask reports it as such

    def is_complete(self) -> bool:
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    def check(self) -> None:
        """Raises ValueError when the matcher has failed: a refused token, or a limit reached."""
        if self.matcher.is_error():
            raise ValueError(reason(self.matcher.get_error()))

    def fork(self) -> LlgConstraint:
        """A constraint of its own in the same state."""
        return LlgConstraint(self.matcher.deep_copy(), self._end_ids)


def compile_llg(grammar: Grammar, vocabulary: Vocabulary, *, running: bool = True) -> LlgConstraint:
    """Compile within llguidance's limits, which are tighter where it is only tried. Raises `GrammarError`. Releases the global lock while it works."""
    matcher = LLMatcher(
        vocabulary.tokenizer,
        spell(grammar),
        log_level=0,
        limits=LLParserLimits(**limits_of(grammar, running=running)),
    )
    if matcher.is_error():
        raise GrammarError(reason(matcher.get_error()))
    return LlgConstraint(matcher, vocabulary.end_ids)


def fill_in_parallel(
    executor: LLExecutor, masks: I32, rows: Sequence[tuple[int, Constraint | None]]
) -> list[tuple[int, str]]:
    """Write `masks[i]` for each (i, llguidance constraint) on the executor's threads; (i, message) of those that
    failed. `masks` is one C-contiguous array of int32 words, a row each."""
    batch = [(i, constraint.matcher) for i, constraint in rows if isinstance(constraint, LlgConstraint)]
    executor.unsafe_compute_mask_ptr(
        [(matcher, i) for i, matcher in batch],
        masks.ctypes.data,
        masks.shape[1] * masks.itemsize,
        masks.shape[0],
    )
    return [(i, reason(matcher.get_error())) for i, matcher in batch if matcher.is_error()]
