"""Owns turning a tree over bytes into the smallest deterministic automaton that accepts it. Pure; compiler threads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.constraints.regex_parse import Alt, Byte, Cat, Node, Unsupported

MAX_NFA_STATES = 20_000
MAX_DFA_STATES = 2_000
MAX_SUBSET_WORK = 2_000_000  # NFA states looked at while subsets are built


@dataclass(frozen=True, slots=True)
class Dfa:
    """An automaton that starts in state 0. An end can be reached from every state; -1 stands for no further match."""

    next_state: npt.NDArray[np.int32]  # (states, 256)
    accepts: npt.NDArray[np.bool_]  # (states,)


class _Nfa:
    """Thompson's construction: one entry, one exit, each state with empty moves and at most one byte move."""

    def __init__(self) -> None:
        self.empty: list[list[int]] = []
        self.byte: list[tuple[int, int] | None] = []  # (mask, target)

    def state(self) -> int:
        if len(self.empty) >= MAX_NFA_STATES:
            raise Unsupported(f"more than {MAX_NFA_STATES} states before simplification")
        self.empty.append([])
        self.byte.append(None)
        return len(self.empty) - 1

    def add(self, node: Node, start: int) -> int:
        """Append the node after `start`; returns its exit."""
        if isinstance(node, Byte):
            end = self.state()
            if node.mask and (self.byte[start] is not None or self.empty[start]):
                fresh = self.state()
                self.empty[start].append(fresh)
                start = fresh
            if node.mask:
                self.byte[start] = (node.mask, end)
            return end
        if isinstance(node, Cat):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Alt):
            end = self.state()
            for part in node.parts:
                entry = self.state()
                self.empty[start].append(entry)
                self.empty[self.add(part, entry)].append(end)
            return end
        for _ in range(node.low):
            start = self.add(node.part, start)
        if node.high is None:
            loop = self.state()
            self.empty[start].append(loop)
            entry = self.state()
            self.empty[loop].append(entry)
            self.empty[self.add(node.part, entry)].append(loop)
            end = self.state()
            self.empty[loop].append(end)
            return end
        end = self.state()
        for _ in range(node.high - node.low):
            entry = self.state()
            self.empty[start] += [entry, end]
            start = self.add(node.part, entry)
        self.empty[start].append(end)
        return end


def build_dfa(node: Node) -> Dfa:
    """Subset construction over classes of bytes, dead states cut, equal states merged. Raises `Unsupported`."""
    nfa = _Nfa()
    start = nfa.state()
    try:
        final = nfa.add(node, start)
    except RecursionError:
        raise Unsupported("nested too deeply") from None
    class_of, examples = _byte_classes({move[0] for move in nfa.byte if move is not None})
    closures: dict[int, frozenset[int]] = {}

    def closure(state: int) -> frozenset[int]:
        known = closures.get(state)
        if known is None:
            seen, stack = {state}, [state]
            while stack:
                for target in nfa.empty[stack.pop()]:
                    if target not in seen:
                        seen.add(target)
                        stack.append(target)
            known = closures[state] = frozenset(s for s in seen if nfa.byte[s] is not None or s == final)
        return known

    subsets = {closure(start): 0}
    order = list(subsets)
    rows: list[list[int]] = []
    work = 0
    for subset in order:  # grows while it is walked
        row = []
        moves = [move for move in (nfa.byte[s] for s in subset) if move is not None]
        for example in examples:
            targets: set[int] = set()
            work += len(moves)
            for mask, target in moves:
                if mask >> example & 1:
                    reached = closure(target)
                    work += len(reached)
                    targets |= reached
            if not targets:
                row.append(-1)
                continue
            key = frozenset(targets)
            number = subsets.setdefault(key, len(subsets))
            if number == len(order):
                order.append(key)
            row.append(number)
        rows.append(row)
        if len(order) > MAX_DFA_STATES or work > MAX_SUBSET_WORK:
            raise Unsupported(f"more than {MAX_DFA_STATES} states")
    table = np.array(rows, np.int32).reshape(len(rows), len(examples))
    accepts = np.array([final in subset for subset in order])
    return _reduce(table, accepts, class_of)


def _byte_classes(masks: set[int]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Bytes no mask tells apart are one class: class of each byte, and one byte of each class."""
    seen: dict[tuple[int, ...], int] = {}
    class_of = np.zeros(256, np.int64)
    examples: list[int] = []
    ordered = sorted(masks)
    for byte in range(256):
        key = tuple([mask >> byte & 1 for mask in ordered])
        number = seen.setdefault(key, len(seen))
        if number == len(examples):
            examples.append(byte)
        class_of[byte] = number
    return class_of, examples


def _reduce(
    table: npt.NDArray[np.int32], accepts: npt.NDArray[np.bool_], class_of: npt.NDArray[np.int64]
) -> Dfa:
    alive = accepts.copy()
    while True:  # backwards from the accepting states
        padded = np.append(alive, False)  # index -1: dead
        grown = alive | padded[table].any(axis=1)
        if (grown == alive).all():
            break
        alive = grown
    if not alive[0]:
        raise Unsupported("nothing matches")
    table = np.where(np.append(alive, False)[table], table, -1)
    # Moore: split blocks until the successors' blocks agree. Rows are told apart by a hash, checked at the end.
    live = np.flatnonzero(alive)
    block = np.where(alive, accepts.astype(np.int64), -1)
    factors = np.random.default_rng(0).integers(1, 1 << 63, table.shape[1] + 1, np.uint64)
    num_blocks = 0
    while True:
        successors = np.append(block, -1)[table]
        rows = np.column_stack([block, successors])[live]
        _, examples, merged = np.unique(
            (rows.astype(np.uint64) * factors).sum(axis=1), return_index=True, return_inverse=True
        )
        if len(examples) == num_blocks:
            break
        num_blocks = len(examples)
        block[live] = merged.ravel()
    if not (rows == rows[examples[merged.ravel()]]).all():
        raise Unsupported("two states have one hash")
    # Number the blocks so that the start is 0.
    first, block = int(block[0]), block.copy()
    block[alive] = (block[alive] - first) % num_blocks
    states = np.full((num_blocks, table.shape[1]), -1, np.int32)
    ends = np.zeros(num_blocks, np.bool_)
    states[block[live]] = np.append(block, -1)[table[live]]
    ends[block[live]] = accepts[live]
    return Dfa(np.ascontiguousarray(states[:, class_of]), ends)
