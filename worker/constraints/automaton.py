"""Owns token automata: constraints as tables over token classes, small enough to live on the device. numpy only.

state' = next_state[state, class_of[token]]; the allowed ids of a state are masks[mask_of[state]]. Tables are built once
on a compiler thread and shared; a `TokenAutomaton` is one sequence's state over them, and works on the host too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from worker.constraints.regex_dfa import Dfa, build_dfa
from worker.constraints.regex_parse import Alt, Node, Unsupported, literal

I32 = npt.NDArray[np.int32]

REFUSED = -1
MAX_TABLE_CELLS = 1 << 20  # states × classes
MAX_MASK_WORDS = 1 << 22  # different masks × words
MAX_TOKEN_WORK = 6_000_000  # bytes stepped through a text automaton while building token tables: some 0.2 s


@dataclass(frozen=True, slots=True, eq=False)
class TokenTables:
    """One compiled constraint. Sequences start in state 0; `end` allows only end ids and is never left."""

    next_state: I32  # (states, classes); REFUSED where the token is not allowed
    class_of: I32  # (vocabulary,); class 0 is refused everywhere
    mask_of: I32  # (states,) index into `masks`
    masks: I32  # (different masks, words): id i is bit i % 32 of word i // 32
    end: int

    @property
    def num_states(self) -> int:
        """How many states there are, `end` included."""
        return int(self.next_state.shape[0])

    @property
    def num_bytes(self) -> int:
        """Memory of all tables."""
        arrays = (self.next_state, self.class_of, self.mask_of, self.masks)
        return sum(int(array.nbytes) for array in arrays)


class TokenAutomaton:
    """One sequence's state over shared tables; a `worker.constraints.constraint.Constraint`."""

    __slots__ = ("state", "tables")

    def __init__(self, tables: TokenTables) -> None:
        self.tables = tables
        self.state = 0

    def fill_mask(self, words: I32) -> None:
        tables = self.tables
        words[:] = tables.masks[tables.mask_of[self.state]]

    def advance(self, token_id: int) -> None:
        tables = self.tables
        state = int(tables.next_state[self.state, tables.class_of[token_id]])
        if state == REFUSED:
            raise ValueError(f"token {token_id} in state {self.state}")
        self.state = state

    def is_complete(self) -> bool:
        tables = self.tables
        return bool(tables.mask_of[self.state] == tables.mask_of[tables.end])

    def fork(self) -> TokenAutomaton:
        """A constraint of its own in the same state."""
        other = TokenAutomaton(self.tables)
        other.state = self.state
        return other


# ---------------------------------------------------------------------- constraints over token ids


@lru_cache(maxsize=64)
def spatial_tables(
    *, coord_id: int, size_id: int, end_id: int, with_size: bool, max_objects: int, vocab_size: int
) -> TokenTables:
    """(coord, coord[, size])* up to `max_objects` times, then an end: objects are counted in the states."""
    steps = [coord_id, coord_id, size_id] if with_size else [coord_id, coord_id]
    moves: list[dict[int, int]] = []
    for number in range(max_objects):
        for place, token_id in enumerate(steps):
            state = number * len(steps) + place
            moves.append({token_id: state + 1})
    moves.append({})
    accepting = range(0, len(moves), len(steps))
    return _tables_of_moves(moves, accepting, (end_id,), vocab_size)


def sequence_tables(
    sequences: Sequence[Sequence[int]], end_ids: Sequence[int], vocab_size: int
) -> TokenTables:
    """One of these sequences of token ids, then an end. Raises `Unsupported` when the tables grow too large."""
    moves: list[dict[int, int]] = [{}]
    accepting: set[int] = set()
    for token_ids in sequences:
        state = 0
        for token_id in token_ids:
            following = moves[state].setdefault(token_id, len(moves))
            if following == len(moves):
                moves.append({})
            state = following
        accepting.add(state)
    return _tables_of_moves(moves, sorted(accepting), end_ids, vocab_size)


def _tables_of_moves(
    moves: list[dict[int, int]], accepting: Sequence[int], end_ids: Sequence[int], vocab_size: int
) -> TokenTables:
    rows = []
    for row in moves:
        ids = np.fromiter(row, np.int64, len(row))
        rows.append((ids, np.fromiter(row.values(), np.int32, len(row))))
    return _assemble(rows, np.isin(np.arange(len(moves)), accepting), end_ids, vocab_size)


def tables_of_states(
    states: Sequence[tuple[npt.NDArray[np.int64], I32]],
    accepting: Sequence[int],
    end_ids: Sequence[int],
    vocab_size: int,
) -> TokenTables:
    """Tables from each state's (allowed ids, next states), ends left out. Raises `Unsupported` when they grow too large."""
    return _assemble(states, np.isin(np.arange(len(states)), accepting), end_ids, vocab_size)


# ---------------------------------------------------------------------- constraints over text


class TokenBytes:
    """A vocabulary's bytes laid out for walking all tokens at once."""

    def __init__(self, token_bytes: Sequence[bytes], end_ids: Sequence[int]) -> None:
        """`token_bytes[i]` is b"" for ids no text constraint allows."""
        ends = set(end_ids)
        self.vocab_size = len(token_bytes)
        self.end_ids = tuple(end_ids)
        self.ids = np.array([i for i, text in enumerate(token_bytes) if text and i not in ends], np.int64)
        lengths = [len(token_bytes[i]) for i in self.ids]
        self.lengths = np.array(lengths, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])[:-1]
        self.bytes = np.frombuffer(b"".join([token_bytes[i] for i in self.ids]), np.uint8)
        self.first = self.bytes[self.starts]


def choice_tables(choices: Sequence[str], vocabulary: TokenBytes) -> TokenTables:
    """One of these texts, in any tokenisation. Raises `Unsupported`."""
    return text_tables(Alt(tuple(literal(choice) for choice in choices)), vocabulary)


def text_tables(node: Node, vocabulary: TokenBytes) -> TokenTables:
    """Every tokenisation of every text the tree matches, then an end. Raises `Unsupported`."""
    dfa = build_dfa(node)
    number = {0: 0}  # text state → token state: only text states at the end of a token become token states
    order = [0]
    rows = []
    work = 0
    for state in order:  # grows while it is walked
        ids, targets, steps = _walk(dfa, state, vocabulary)
        work += steps
        if work > MAX_TOKEN_WORK:
            raise Unsupported("too many tokens fit too many states")
        reached, inverse = np.unique(targets, return_inverse=True)
        numbers = []
        for target in reached.tolist():
            if target not in number:
                number[target] = len(order)
                order.append(target)
            numbers.append(number[target])
        rows.append((ids, np.array(numbers, np.int32)[inverse] if numbers else np.zeros(0, np.int32)))
    return _assemble(rows, dfa.accepts[order], vocabulary.end_ids, vocabulary.vocab_size)


def _walk(
    dfa: Dfa, state: int, vocabulary: TokenBytes
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Every token that may follow in a state: (ids, states after them, number of bytes stepped)."""
    after = dfa.next_state[state][vocabulary.first]
    alive = np.flatnonzero(after >= 0)
    current = after[alive]
    work = len(vocabulary.first) // 16 + len(alive)
    ids: list[npt.NDArray[np.int64]] = []
    targets: list[npt.NDArray[np.int64]] = []
    depth = 1
    while len(alive):
        whole = vocabulary.lengths[alive] == depth
        ids.append(vocabulary.ids[alive[whole]])
        targets.append(current[whole].astype(np.int64))
        alive, current = alive[~whole], current[~whole]
        current = dfa.next_state[current, vocabulary.bytes[vocabulary.starts[alive] + depth]]
        going = current >= 0
        alive, current = alive[going], current[going]
        work += len(going)
        depth += 1
    if not ids:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), work
    return np.concatenate(ids), np.concatenate(targets), work


# ---------------------------------------------------------------------- tables


def _assemble(
    rows: Sequence[tuple[npt.NDArray[np.int64], I32]],
    accepts: npt.NDArray[np.bool_],
    end_ids: Sequence[int],
    vocab_size: int,
) -> TokenTables:
    """Tables from each state's (allowed ids, next states). Tokens that behave alike everywhere share a class."""
    num, ends = len(rows), np.array(end_ids, np.int64)
    rng = np.random.default_rng(
        num
    )  # any odd multipliers do: the check below finds equal hashes of unequal columns
    hashes = np.zeros(vocab_size, np.uint64)
    for (ids, following), factor in zip(rows, _factors(rng, num), strict=True):
        hashes[ids] += (following.astype(np.uint64) + np.uint64(1)) * factor
    hashes[ends] = 1  # a sum of odd multiples equals 1 about as often as two sums are equal
    distinct, class_of = np.unique(hashes, return_inverse=True)
    if distinct[0] != 0:  # every id is allowed somewhere: class 0 stays the refused one all the same
        class_of = class_of + 1
    num_classes = int(class_of.max()) + 1
    if (num + 1) * num_classes > MAX_TABLE_CELLS:
        raise Unsupported(f"{num + 1} states and {num_classes} classes of tokens")
    classes: I32 = class_of.reshape(-1).astype(np.int32)
    end = num
    end_class = int(classes[ends[0]])
    table = np.full((num + 1, num_classes), REFUSED, np.int32)
    sizes = np.bincount(classes, minlength=num_classes)
    for state, (ids, following) in enumerate(rows):
        table[state, classes[ids]] = following
        if not (
            np.array_equal(table[state, classes[ids]], following)
            and int(sizes[table[state] != REFUSED].sum()) == len(ids)
        ):
            raise Unsupported("two kinds of tokens have one hash")
    table[:num, end_class] = np.where(accepts, end, REFUSED)
    table[end, end_class] = end
    # States that allow the same ids share a mask.
    patterns, mask_of = np.unique(table != REFUSED, axis=0, return_inverse=True)
    num_words = (vocab_size + 31) // 32
    if len(patterns) * num_words > MAX_MASK_WORDS:
        raise Unsupported(f"{len(patterns)} different masks")
    masks = np.empty((len(patterns), num_words), np.int32)
    for number, allowed in enumerate(patterns):
        masks[number] = _words(allowed[classes], num_words)
    return TokenTables(table, classes, mask_of.reshape(-1).astype(np.int32), masks, end)


def _factors(rng: np.random.Generator, num: int) -> Iterator[np.uint64]:
    for value in rng.integers(0, 1 << 63, num, np.uint64):
        yield np.uint64(value | np.uint64(1))


def _words(allowed: npt.NDArray[np.bool_], num_words: int) -> I32:
    bits = np.zeros(num_words * 32, np.bool_)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)
