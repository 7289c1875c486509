"""Owns the state of one worker's link, the epoch served, and what is due when. Pure; gateway's loop.

connecting → ready (a worker of our version answered) → connecting (that worker was lost); from either to refused (the
worker found cannot be used; it is asked again, seldom), and from any to closed, the end. Illegal moves raise `LinkError`
and change nothing.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from shared.protocol import Beat, Ready

_HELLO_S: Final = 0.25
_REFUSED_HELLO_S: Final = 5.0
_PING_S: Final = 1.0
_MOST_EXPECTED_S: Final = 600.0  # the longest silence that a worker may announce
_EARLY: Final = (
    0.9  # share of an interval that must have passed, so that a tick that is a little early still counts
)


class LinkError(RuntimeError):
    """A move out of order: our own bug."""


class LinkState(Enum):
    """The states of a link."""

    CONNECTING = "connecting"
    READY = "ready"
    REFUSED = "refused"
    CLOSED = "closed"


MOVES: Final[dict[LinkState, frozenset[LinkState]]] = {
    LinkState.CONNECTING: frozenset({LinkState.READY, LinkState.REFUSED, LinkState.CLOSED}),
    LinkState.READY: frozenset({LinkState.CONNECTING, LinkState.REFUSED, LinkState.CLOSED}),
    LinkState.REFUSED: frozenset({LinkState.READY, LinkState.REFUSED, LinkState.CLOSED}),
    LinkState.CLOSED: frozenset(),
}


class LinkLife:
    """One link's state. `ready` is the worker's announcement while it serves and makes progress."""

    __slots__ = (
        "_hello_s",
        "_patience_s",
        "_ping_s",
        "_progress_s",
        "beat",
        "lost_epoch",
        "ready",
        "refusal",
        "refused_epoch",
        "state",
    )

    def __init__(self) -> None:
        self.state = LinkState.CONNECTING
        self.ready: Ready | None = None
        self.beat: Beat | None = None
        self.lost_epoch = -1  # the epoch of the worker last lost
        self.refusal = ""  # why the worker found cannot be used; empty if it can
        self.refused_epoch = -1  # of the worker whose announcement was refused
        self._patience_s = 0.0
        self._progress_s = 0.0
        self._hello_s = 0.0
        self._ping_s = 0.0

    @property
    def epoch(self) -> int:
        """The serving worker's epoch; −1 when none serves."""
        return self.ready.epoch if self.ready is not None else -1

    # ------------------------------------------------------------ moves

    def on_ready(self, ready: Ready, now_s: float) -> None:
        """A worker serves from now on. Raises `LinkError` while another serves: call `on_lost` for that one first."""
        self._move(LinkState.READY)
        self.ready, self.beat = ready, None
        self.refusal = ""
        self._patience_s = ready.limits.progress_timeout_s
        self._progress_s = now_s

    def on_lost(self) -> None:
        """The serving worker is gone. Raises `LinkError` where none served."""
        self._move(LinkState.CONNECTING)
        self._forget()

    def refuse(self, reason: str) -> None:
        """The worker found cannot be used. Raises `LinkError` once closed."""
        self._move(LinkState.REFUSED)
        if self.ready is not None:
            self.refused_epoch = self.ready.epoch
        self._forget()
        self.refusal = reason

    def close(self) -> None:
        """The end. Raises `LinkError` when it has come already."""
        self._move(LinkState.CLOSED)
        self.ready = None

    def _forget(self) -> None:
        if self.ready is not None:
            self.lost_epoch = self.ready.epoch
        self.ready = self.beat = None
        self._hello_s = 0.0

    def _move(self, to: LinkState) -> None:
        if to not in MOVES[self.state]:
            raise LinkError(f"a link cannot go from {self.state.value} to {to.value}")
        self.state = to

    # ------------------------------------------------------------ time

    def on_progress(self, now_s: float) -> None:
        """The serving worker's decode thread did something."""
        self._progress_s = now_s

    def on_beat(self, beat: Beat, now_s: float) -> None:
        """A heartbeat arrived: progress, and the time that the worker's steps should take from here."""
        if self.ready is not None:
            expected_s = beat.expected_s if 0 <= beat.expected_s <= _MOST_EXPECTED_S else 0.0
            self._patience_s = self.ready.limits.progress_timeout_s + expected_s
        self.beat = beat
        self._progress_s = now_s

    def silent_s(self, now_s: float) -> float:
        """For how long a serving worker has made no progress, where that is too long; else 0."""
        silent_s = now_s - self._progress_s
        return silent_s if self.ready is not None and silent_s >= self._patience_s else 0.0

    def ask_soon(self) -> None:
        """Make a hello due at once."""
        self._hello_s = 0.0

    def hello_due(self, now_s: float) -> bool:
        """Whether a hello is due: no worker serves, and the last hello was long enough ago."""
        wait_s = _REFUSED_HELLO_S if self.state is LinkState.REFUSED else _HELLO_S
        return self.ready is None and now_s - self._hello_s >= wait_s * _EARLY

    def on_hello(self, now_s: float) -> None:
        """A hello was sent."""
        self._hello_s = now_s

    def ping_due(self, now_s: float) -> bool:
        """Whether a ping is due to renew the lease."""
        return self.ready is not None and now_s - self._ping_s >= _PING_S * _EARLY

    def on_ping(self, now_s: float) -> None:
        """A ping was sent."""
        self._ping_s = now_s
