"""Owns the constraints that were compiled already, and what was refused, by grammar. Threads of the compiler, under its lock.

What an entry weighs was measured where it was compiled first, in a process of its own. Forks of an llguidance matcher share a
lexer that grows as it is used, so twice that is counted, and it is compiled afresh after a number of uses.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from shared.protocol import Grammar
from worker.constraints.automaton import TokenAutomaton
from worker.constraints.llg import LlgConstraint

CACHE_BYTES: Final = 64 << 20
LLG_USES: Final = 64
MAX_REFUSALS: Final = 512
_LEAST_BYTES: Final = 64 << 10

Key = tuple[str, str]


@dataclass(slots=True)
class _Entry:
    constraint: LlgConstraint | TokenAutomaton
    num_bytes: int
    uses: int = 0


class GrammarCache:
    """Constraints within a bound of bytes, and refusals within a bound of number; the least used go first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._refusals: OrderedDict[Key, str] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, grammar: Grammar) -> LlgConstraint | TokenAutomaton | None:
        """A constraint of the caller's own, or None where the grammar is not known."""
        key = (grammar.kind, grammar.source)
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        entry.uses += 1
        constraint = entry.constraint.fork()
        if isinstance(constraint, LlgConstraint) and entry.uses >= LLG_USES:
            self._drop(key)
        return constraint

    def keep(self, grammar: Grammar, constraint: LlgConstraint | TokenAutomaton, measured_bytes: int) -> None:
        """Keep a constraint that nobody has advanced."""
        is_shared = isinstance(constraint, LlgConstraint)
        num_bytes = 2 * max(measured_bytes, _LEAST_BYTES) if is_shared else measured_bytes
        num_bytes += len(grammar.source)
        key = (grammar.kind, grammar.source)
        self._drop(key)
        self._entries[key] = _Entry(constraint, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > CACHE_BYTES:
            self._drop(next(iter(self._entries)))

    def refusal(self, grammar: Grammar) -> str | None:
        """Why the grammar was refused before."""
        return self._refusals.get((grammar.kind, grammar.source))

    def refuse(self, grammar: Grammar, why: str) -> None:
        """Remember a refusal."""
        self._refusals[grammar.kind, grammar.source] = why
        while len(self._refusals) > MAX_REFUSALS:
            self._refusals.popitem(last=False)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
