"""Owns the form of an answer that is thought out first: a thought, its closing id, an opener, the answer. Pure; decode thread."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from worker.constraints.automaton import TokenTables, tables_of_states


@lru_cache(maxsize=16)
def reasoning_tables(
    *, end_id: int, banned_ids: tuple[int, ...], closing_id: int, opener: tuple[int, ...], vocab_size: int
) -> TokenTables:
    """In the thought any id but `banned_ids`; behind `closing_id` the opener's ids alone, one by one; in the answer any id but
    `closing_id`, and an end."""
    answer = 1 + len(opener)
    every = np.arange(vocab_size, dtype=np.int64)

    def moving(
        allowed: np.ndarray[tuple[int], np.dtype[np.bool_]], state: int
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = every[allowed]
        return ids, np.full(len(ids), state, np.int32)

    thinks = ~np.isin(every, (*banned_ids, end_id))
    ids, following = moving(thinks, 0)
    following[ids == closing_id] = 1
    states = [(ids, following)]
    for place, token_id in enumerate(opener):
        states.append(moving(every == token_id, place + 2))
    states.append(moving(~np.isin(every, (closing_id, end_id)), answer))
    return tables_of_states(states, accepting=(answer,), end_ids=(end_id,), vocab_size=vocab_size)
