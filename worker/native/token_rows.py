"""Owns which tokens of a step the compiled attention takes, each as a row of its own, and what each may see. Decode thread.

A decode row sees all tokens of its sequence; a prompt's token sees those up to itself, or a whole bidirectional prefix:
always a leading part. So the tokens of short prompts can be rows too, where torch's attention would take a dozen
operations a chunk in every layer and keep a step from being one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.forward import PrefillSegment, StepTokens, check_prefix

MOST_KEYS = 512
"""Most keys of a chunk that goes as rows, unless its queries are few. Measured without matrix registers: a whole
forward was 1.15 to 1.7 times as quick by rows up to here, and equal at 1,024, where torch's blocked product wins."""
FEW_QUERIES = 16


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The leading tokens of a step, as rows."""

    num: int
    lengths: Tensor  # (num,) int32: leading positions of its sequence that each row sees, itself counted
    tables: Tensor | None  # (num, P) int32, of decode rows alone
    runs: Tensor | None
    """(R, 2) int64: how many consecutive rows are one sequence's, and the address of its int32 block table."""


def token_rows(tokens: StepTokens) -> TokenRows | None:
    """All tokens if every chunk is short, else the decode rows; None if there is nothing to take.

    Raises ValueError when a chunk ends inside a prefix that it also begins in.
    """
    rows, chunks = tokens.decode, tokens.prefills
    for chunk in chunks:
        check_prefix(chunk)
    if not chunks or not all([_is_short(chunk) for chunk in chunks]):
        if rows is None:
            return None
        return TokenRows(rows.num_rows, rows.lengths[: rows.num_rows], rows.block_tables, None)
    lengths, runs = [], []
    if rows is not None:
        lengths.append(rows.lengths[: rows.num_rows].numpy())
        own = np.ones((rows.num_rows, 2), np.int64)
        line_bytes = rows.block_tables.stride(0) * rows.block_tables.element_size()
        own[:, 1] = rows.block_tables.data_ptr() + line_bytes * np.arange(rows.num_rows)
        runs.append(own)
    for chunk in chunks:
        end = chunk.num_context + chunk.num_tokens
        seen = np.arange(chunk.num_context + 1, end + 1, dtype=np.int32)
        lengths.append(np.maximum(seen, chunk.prefix_tokens, dtype=np.int32))
        runs.append(np.array([[chunk.num_tokens, chunk.block_table.data_ptr()]], np.int64))
    together = np.concatenate(lengths)
    return TokenRows(len(together), torch.from_numpy(together), None, torch.from_numpy(np.concatenate(runs)))


def _is_short(chunk: PrefillSegment) -> bool:
    return chunk.num_tokens <= FEW_QUERIES or chunk.num_context + chunk.num_tokens <= MOST_KEYS
