"""Owns laying out the tokens of a step for the compiled attention: what each may see, and where its keys lie. Decode thread.

A decode row sees all tokens of its sequence; a prompt's token sees those up to itself, or a whole bidirectional prefix:
always a leading part, or in layers with a window that part from `window` - 1 keys before the token on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.forward import StepTokens, check_prefix


@dataclass(frozen=True, slots=True)
class TokenRows:
    """All tokens of a step, a row each: decode rows, then the chunks' tokens."""

    num: int
    lengths: Tensor  # (num,) int32: leading positions of its sequence that each row sees, itself counted
    tables: Tensor | None  # (num, P) int32, of decode rows alone
    runs: Tensor | None
    """(R, 4) int64: how many consecutive rows are one sequence's, the address of its int32 block table, the first one's
    position if they are a chunk's, and whether they are."""


def token_rows(tokens: StepTokens) -> TokenRows | None:
    """None for a step without tokens. Raises ValueError when a chunk ends inside a prefix that it also begins in."""
    rows, chunks = tokens.decode, tokens.prefills
    if not chunks:
        if rows is None:
            return None
        return TokenRows(rows.num_rows, rows.lengths[: rows.num_rows], rows.block_tables, None)
    lengths, runs = [], []
    if rows is not None:
        lengths.append(rows.lengths[: rows.num_rows].numpy())
        own = np.zeros((rows.num_rows, 4), np.int64)
        line_bytes = rows.block_tables.stride(0) * rows.block_tables.element_size()
        own[:, 0] = 1
        own[:, 1] = rows.block_tables.data_ptr() + line_bytes * np.arange(rows.num_rows)
        runs.append(own)
    for chunk in chunks:
        check_prefix(chunk)
        end = chunk.num_context + chunk.num_tokens
        seen = np.arange(chunk.num_context + 1, end + 1, dtype=np.int32)
        lengths.append(np.maximum(seen, chunk.prefix_tokens, dtype=np.int32))
        run = (chunk.num_tokens, chunk.block_table.data_ptr(), chunk.num_context, 1)
        runs.append(np.array([run], np.int64))
    together = np.concatenate(lengths)
    return TokenRows(len(together), torch.from_numpy(together), None, torch.from_numpy(np.concatenate(runs)))
