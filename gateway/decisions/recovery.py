"""Owns requests whose worker was lost before their first token: who is tried again, when, and who is quarantined. Pure.

Runs on the gateway's loop. Those tried again go in rounds, ahead of newcomers; a round is on trial until all of it have
shown a token, ended, or been there for a while. docs/architecture.md says why ("When a worker dies").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import Final, Generic, Protocol, TypeVar

TRIAL_S: Final = 1.0  # a request that waits for so long without harm no longer holds up the next round
FIRST_ROUND: Final = 16  # the first round is the 16th part of those who wait, at least one
FEW: Final = 8  # so many go one by one: quick enough, and whoever kills is found at once
MAX_ATTEMPTS: Final = 8  # of an innocent: workers die around it again and again
MAX_SILENCES: Final = 2  # workers that hung or were stopped: no proof, but each costs everybody seconds


@dataclass(slots=True)
class Record:
    """What happened to the workers that held a request before its first token."""

    num_attempts: int = 0
    num_crashes: int = 0
    num_silences: int = 0  # workers that fell silent: slow, stopped or hung, which is no evidence
    num_trials: int = 0  # crashes while the request was on trial
    num_singled_out: int = 0  # of these, while nobody else was on trial
    was_alone: bool = False  # a crash of a worker that held no other request at all
    number: int = 0  # in the order of losses: decides between two that were accepted at the same time
    lost_s: float = 0.0  # when it lost its worker last
    unserved_s: float = 0.0  # since when nobody is known to serve its model

    @property
    def has_lost(self) -> bool:
        """Whether it lost a worker; one that a leaving worker turned away did not, and is never on trial."""
        return bool(self.num_crashes or self.num_silences)

    @property
    def level(self) -> int:
        """How much speaks against the request: 0 is nothing; from 2 it is tried by itself."""
        return 2 if self.was_alone or self.num_singled_out else min(2, self.num_trials)


class Verdict(Enum):
    """What becomes of a request that lost its worker before its first token."""

    RETRY = "retry"
    QUARANTINE = "quarantine"
    GIVE_UP = "give up"  # it ends with the loss of its worker


def judge(record: Record) -> Verdict:
    """Quarantine needs two crashes, one of them while the request was alone, or three, two of them while it was singled out
    (one, if all were trials).

    All other attempts ended in a crash as well, or in silence: a request that showed a token never comes here again. An
    innocent one meets such crashes only if worker after worker happens to be killed in the moment that it begins.
    """
    if record.num_crashes >= 2 and record.was_alone:
        return Verdict.QUARANTINE
    singled_out = record.num_singled_out >= 2 or (record.num_singled_out and record.num_trials >= 3)
    if record.num_crashes >= 3 and singled_out:
        return Verdict.QUARANTINE
    if record.num_attempts >= MAX_ATTEMPTS or record.num_silences >= MAX_SILENCES:
        return Verdict.GIVE_UP
    return Verdict.RETRY


class Retryable(Protocol):
    """A request as recovery sees it."""

    @property
    def record(self) -> Record:
        """Its own; changed here and nowhere else, but for `num_attempts`."""

    @property
    def tenant(self) -> str:
        """Whose it is: tenants take turns."""

    @property
    def started_s(self) -> float:
        """When it was accepted: within a tenant the oldest goes first."""


F = TypeVar("F", bound=Retryable)


@dataclass(slots=True)
class _Trial(Generic[F]):
    """The round that was sent last: those of it who have neither shown a token nor ended."""

    flights: list[F] = field(default_factory=list)
    until_s: float = 0.0


class Recovery(Generic[F]):
    """Those who wait to be tried again, and those on trial.

    A crash among many says next to nothing about each of them, so they are soon all sent: rounds of many double while no
    worker dies. Where one does, its round is smaller than what it came from, and goes first on the next worker, before that
    has begun streams which would die with it: a request that kills is by itself after a few crashes.
    """

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: how long one may wait while nobody serves its model."""
        self._wait_s = wait_s
        self._file: dict[int, F] = {}  # by id()
        self._trial: _Trial[F] = _Trial()
        self._numbers = count(1)
        self._round_size = 0  # of the last round that did no harm; 0: none yet at this level
        self._was_slow = False  # the last round ended by time
        self._level = 0

    def __len__(self) -> int:
        return len(self._file)

    @property
    def on_trial(self) -> Sequence[F]:
        """Sent, and not yet cleared."""
        return self._trial.flights

    @property
    def has_suspects(self) -> bool:
        """Whether there is evidence against anybody under way here."""
        flights = (*self._trial.flights, *self._file.values())
        return any(flight.record.level for flight in flights)

    # ------------------------------------------------------------ losses

    def on_loss(
        self, unstarted: Iterable[F], now_s: float, *, num_held: int, crashed: bool
    ) -> list[tuple[F, Verdict]]:
        """A worker that held `num_held` requests is lost, these of them before their first token; judges each.

        Those with the verdict RETRY wait here from now on. Not `crashed`: it fell silent.
        """
        verdicts = []
        tried = self._trial.flights
        num_tried = len(tried)
        lost = list(unstarted)
        for flight in lost:
            record = flight.record
            on_trial = any(flight is other for other in tried)
            if crashed:
                record.num_crashes += 1
                record.num_trials += on_trial
                record.num_singled_out += on_trial and num_tried == 1
                record.was_alone |= num_held == 1
            else:
                record.num_silences += 1
            verdict = judge(record)
            verdicts.append((flight, verdict))
            if verdict is Verdict.RETRY:
                record.number = record.number or next(self._numbers)
                record.lost_s = record.unserved_s = now_s
                self._file[id(flight)] = flight
        gone = {id(flight) for flight in lost}
        tried[:] = [flight for flight in tried if id(flight) not in gone]
        self._round_size = 0
        return verdicts

    # ------------------------------------------------------------ rounds

    def next_round(self, now_s: float) -> list[F]:
        """Those to send now, who are then on trial if they lost a worker; empty while a round is on trial, or when nobody waits."""
        if self._trial.flights or not self._file:
            return []
        level = max(flight.record.level for flight in self._file.values())
        group = fair_order(flight for flight in self._file.values() if flight.record.level == level)
        if level >= 2:
            size = 1
        elif level == self._level and self._round_size:
            grows = self._was_slow or len(group) > FEW
            size = 2 * self._round_size if grows else self._round_size
        else:
            size = max(1, len(group) // FIRST_ROUND)
        self._level, self._round_size, self._was_slow = level, size, False
        chosen = group[:size]
        for flight in chosen:
            del self._file[id(flight)]
        tried = [flight for flight in chosen if flight.record.has_lost]
        self._trial = _Trial(tried, now_s + TRIAL_S if tried else 0.0)
        return chosen

    def put_back(self, flight: F) -> None:
        """The flight could not be sent, or was refused for lack of room: it waits again, in its old place."""
        self._file[id(flight)] = flight
        for at, other in enumerate(self._trial.flights):
            if other is flight:
                del self._trial.flights[at]
                self._round_size = max(0, self._round_size - 1)  # it has shown nothing about its round
                return

    def on_settled(self, flight: F) -> bool:
        """The flight showed a token, or ended. True when its round is over by this, so that the next may go."""
        self._file.pop(id(flight), None)
        for at, other in enumerate(self._trial.flights):
            if other is flight:
                del self._trial.flights[at]
                return not self._trial.flights
        return False

    def on_time(self, now_s: float) -> None:
        """A round that has been on trial for long enough is over: who is still waiting there did no harm so far."""
        if self._trial.flights and self._trial.until_s <= now_s:
            self._was_slow = True
            self._trial.flights.clear()

    def expired(self, now_s: float, is_served: Callable[[F], bool]) -> list[F]:
        """Those who waited in vain while nobody served their model; they leave."""
        late = []
        for flight in self._file.values():
            if is_served(flight):
                flight.record.unserved_s = now_s
            elif now_s >= flight.record.unserved_s + self._wait_s:
                late.append(flight)
        for flight in late:
            del self._file[id(flight)]
        return late

    def __iter__(self) -> Iterator[F]:
        """Those who wait."""
        return iter(list(self._file.values()))


def fair_order(flights: Iterable[F]) -> list[F]:
    """The oldest of every tenant, then the second oldest of every tenant, and so on; the older first in each turn."""
    turns: Counter[str] = Counter()
    ordered: list[tuple[int, float, int, F]] = []
    for flight in sorted(flights, key=lambda flight: (flight.started_s, flight.record.number)):
        ordered.append((turns[flight.tenant], flight.started_s, flight.record.number, flight))
        turns[flight.tenant] += 1
    return [flight for *_, flight in sorted(ordered, key=lambda item: item[:3])]
