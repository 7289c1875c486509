"""Owns how many workers there should be, from what each has to do. The time comes in; nothing here keeps a clock.

What is asked for is counted in workers, from the whole load and not from the number of workers there are, so that starting
one does not change the answer. It is compared with what is wanted now over two spans of time: more are wanted when *every*
answer of the last `up_after_s` said so, fewer when *no* answer of the last `down_after_s` wanted as many. That is the
horizontal autoscaler of Kubernetes with its stabilisation windows, fed with rows and pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_ROUNDING: Final = 1e-9  # 0.8 of 0.8 is one worker, not two


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What one worker said last."""

    num_running: int  # sequences in rows
    num_waiting: int  # sequences that wait for a row
    max_rows: int
    pages_in_use: int  # without those that only the prefix cache holds
    total_pages: int


@dataclass(frozen=True, slots=True)
class ScaleLimits:
    """Between how many workers, and how patient."""

    min_workers: int
    max_workers: int
    target_load: float = 0.8  # of a worker's rows, and of its pages
    up_after_s: float = 5.0
    down_after_s: float = 120.0


@dataclass(frozen=True, slots=True)
class History:
    """Answers given so far: when, and how many workers. Oldest first."""

    answers: tuple[tuple[float, int], ...] = ()


def workers_asked_for(loads: Sequence[WorkerLoad], target_load: float) -> int:
    """How many workers would carry these loads at `target_load` each; at least 1.

    Waiting sequences will take rows, and as many pages as those that run now hold on average: where pages are what is short,
    a queue says how much.
    """
    rows = pages = 0.0
    for load in loads:
        num_sequences = load.num_running + load.num_waiting
        rows += num_sequences / max(1, load.max_rows)
        if load.num_running:
            pages += load.pages_in_use / max(1, load.total_pages) * num_sequences / load.num_running
    return max(1, math.ceil(max(rows, pages) / target_load - _ROUNDING))


def decide(
    history: History, now_s: float, wanted: int, loads: Sequence[WorkerLoad], limits: ScaleLimits
) -> tuple[History, int]:
    """How many workers are to be wanted from now on, and what to remember.

    `wanted` is how many are wanted now, `loads` is of those that serve. At most twice as many at a time; after each rise the
    next one takes `up_after_s` again. While one of them does not serve (it starts, or is placed anew) none is taken away.
    """
    wanted = min(max(wanted, limits.min_workers), limits.max_workers)
    if not loads:  # nobody knows
        return History(), wanted
    since_s = now_s - max(limits.up_after_s, limits.down_after_s)
    kept = [one for one in history.answers if one[0] >= since_s]
    older = [one for one in history.answers if one[0] < since_s][-1:]  # shows that the span is covered
    answers = (*older, *kept, (now_s, workers_asked_for(loads, limits.target_load)))
    history = History(answers)

    recent = _within(answers, now_s - limits.up_after_s)
    if recent is not None and min(recent) > wanted and wanted < limits.max_workers:
        return History(), min(min(recent), 2 * wanted, limits.max_workers)
    recent = _within(answers, now_s - limits.down_after_s)
    if recent is not None and max(recent) < wanted and wanted <= len(loads):
        return history, max(max(recent), limits.min_workers)
    return history, wanted


def _within(answers: Sequence[tuple[float, int]], since_s: float) -> list[int] | None:
    """The answers since then; None unless there were some before, so that they cover the whole span."""
    if answers[0][0] > since_s:
        return None
    return [number for at_s, number in answers if at_s >= since_s]


def choose_leavers(loads: dict[int, WorkerLoad | None], number: int) -> list[int]:
    """Which workers to take away, by their numbers: those that do not serve yet, then those with least to do, newest first."""

    def cost(key: int) -> tuple[int, int]:
        load = loads[key]
        return (-1 if load is None else load.num_running + load.num_waiting), -key

    return sorted(loads, key=cost)[:number]
