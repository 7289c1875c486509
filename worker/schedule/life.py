"""Owns the lives of a sequence and of its next mask, as tables of legal moves. Pure; decode thread.

An illegal move raises `LifeError` and changes nothing: it is our own bug.
"""

from __future__ import annotations

from enum import Enum


class LifeError(RuntimeError):
    """A move that the table does not have."""


class Life(Enum):
    """The states of a sequence in the scheduler."""

    WAITING = "waiting"  # queued: no row, no pages
    RUNNING = "running"  # has a row, and steps are planned for it
    PREEMPTED = "preempted"  # to be released and queued again once nothing in flight holds it
    FINISHED = "finished"  # has its finish reason; a zombie while something in flight holds it
    RELEASED = "released"  # holds nothing any more


LIFE_MOVES = {
    Life.WAITING: (Life.RUNNING, Life.FINISHED),
    Life.RUNNING: (Life.PREEMPTED, Life.FINISHED),
    Life.PREEMPTED: (Life.WAITING, Life.FINISHED),
    Life.FINISHED: (Life.RELEASED,),
    Life.RELEASED: (),
}
HOLDING = (Life.RUNNING, Life.PREEMPTED, Life.FINISHED)
"""Where a sequence may have a row and pages."""


class MaskLife(Enum):
    """The states of the mask of a sequence's next token."""

    NONE = "none"  # the host builds no mask for it
    DUE = "due"  # built with its step
    AWAITED = "awaited"  # a slow mask that is being built ahead, on a thread; the sequence sits out
    READY = "ready"  # built ahead, and kept for its step


MASK_MOVES = {
    MaskLife.NONE: (MaskLife.DUE,),
    MaskLife.DUE: (MaskLife.NONE, MaskLife.AWAITED),
    MaskLife.AWAITED: (MaskLife.READY,),
    MaskLife.READY: (MaskLife.NONE, MaskLife.DUE, MaskLife.AWAITED),
}


def moved(state: Life, to: Life) -> Life:
    """The sequence's new state. Raises LifeError."""
    if to not in LIFE_MOVES[state]:
        raise LifeError(f"a sequence that is {state.value} cannot become {to.value}")
    return to


def mask_moved(state: MaskLife, to: MaskLife) -> MaskLife:
    """The mask's new state. Raises LifeError."""
    if to not in MASK_MOVES[state]:
        raise LifeError(f"a mask that is {state.value} cannot become {to.value}")
    return to
