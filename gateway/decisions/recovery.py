"""Owns requests whose worker died before their first token: one retry each, one at a time. Pure; gateway's loop.

The one being retried is on probation until it shows a token or ends; the next one waits for that. docs/architecture.md
says why ("When a worker dies").
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

MAX_ATTEMPTS = 2


class Retryable(Protocol):
    """A request that was sent to a worker `attempts` times."""

    @property
    def attempts(self) -> int: ...


class Suspect(Retryable, Protocol):
    """A request whose workers were lost: `num_crashes` of them crashed, one of them while it held nothing else
    (`crashed_alone`). A worker that fell silent was slow, stopped or hung, which says nothing about a request."""

    @property
    def num_crashes(self) -> int: ...

    @property
    def crashed_alone(self) -> bool: ...


def is_guilty(suspect: Suspect) -> bool:
    """Whether there is evidence against the request: a crash while it was alone, or a crash at each of its attempts."""
    return suspect.crashed_alone or suspect.num_crashes >= max(1, suspect.attempts)


F = TypeVar("F", bound=Retryable)


@dataclass(slots=True)
class _Waiting(Generic[F]):
    flight: F
    until_s: float


class Recovery(Generic[F]):
    """The file of suspects, and the one on probation."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._file: deque[_Waiting[F]] = deque()
        self._on_probation: F | None = None
        self._probation_until_s = 0.0

    def __len__(self) -> int:
        return len(self._file)

    def take(self, flight: F, now_s: float) -> bool:
        """Queue a flight that lost its worker before its first token. False if it had its retry already."""
        if flight is self._on_probation:
            self._on_probation = None
        if flight.attempts >= MAX_ATTEMPTS:
            return False
        self._file.append(_Waiting(flight, now_s + self._wait_s))
        return True

    def next(self) -> F | None:
        """The flight to send now, which is then on probation; None while another is, or when none waits."""
        if self._on_probation is not None or not self._file:
            return None
        first = self._file.popleft()
        self._on_probation, self._probation_until_s = first.flight, first.until_s
        return first.flight

    def put_back(self, flight: F) -> None:
        """The flight could not be sent (no worker has room): it goes to the front again, with the same time limit."""
        assert flight is self._on_probation
        self._on_probation = None
        self._file.appendleft(_Waiting(flight, self._probation_until_s))

    def on_settled(self, flight: F) -> bool:
        """The flight showed a token, or ended. True when it was the one on probation, so that the next may go."""
        if flight is self._on_probation:
            self._on_probation = None
            return True
        for item in self._file:
            if item.flight is flight:
                self._file.remove(item)
                break
        return False

    def expired(self, now_s: float) -> list[F]:
        """Those who waited for a worker in vain; they leave the file."""
        late = [item for item in self._file if item.until_s <= now_s]
        for item in late:
            self._file.remove(item)
        return [item.flight for item in late]
