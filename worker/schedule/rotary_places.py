"""Owns the positions by which a prompt with pictures is rotated, where those have several axes. Pure; decode thread.

A text token's position is the same on all axes. A picture's tokens stand at (time, row, column): all of one still picture at
the same time, rows and columns counted from where the text before it ended. What follows goes on behind the largest row or
column, so a position is no longer the index among the tokens (M-RoPE; Wang et al. 2024, Qwen2-VL). The groups of a clip that
are continued share rows and columns, each at its moment. That may be later than all that follows; an answer goes on behind the
latest of all positions.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

import numpy as np
import numpy.typing as npt

from worker.schedule.sequence import Picture, Sequence

I32 = npt.NDArray[np.int32]


def prompt_places(num_tokens: int, pictures: Sequence_[Picture]) -> tuple[I32, int]:
    """(3, num_tokens) positions, and position less index behind the prompt. Each picture has one run and its grid."""
    places = np.empty((3, num_tokens), np.int32)
    at = index = begin = latest = 0
    for picture in pictures:
        (run,) = picture.runs
        before = run.position - index
        places[:, index : run.position] = np.arange(at, at + before)
        begin = begin if picture.is_continued else at + before
        index = run.position
        rows, cols = picture.grid
        end = index + rows * cols
        places[0, index:end] = begin + picture.moment
        places[1, index:end] = begin + np.repeat(np.arange(rows), cols)
        places[2, index:end] = begin + np.tile(np.arange(cols), rows)
        latest = max(latest, begin + picture.moment + 1)
        at, index = begin + max(rows, cols), end
    places[:, index:] = np.arange(at, at + num_tokens - index)
    return places, max(latest, at + num_tokens - index) - num_tokens


def places_of(seq: Sequence, start: int, end: int) -> I32:
    """(axes or 1, end - start): positions of a sequence's tokens [start, end), generated ones included."""
    if seq.rotary is None:
        return np.arange(start, end, dtype=np.int32)[None]
    known = seq.rotary[:, start:end]
    first = max(start, seq.num_prompt)
    if first >= end:
        return known
    behind = np.arange(first + seq.rotary_shift, end + seq.rotary_shift, dtype=np.int32)
    return np.concatenate([known, np.broadcast_to(behind, (len(known), end - first))], axis=1)
