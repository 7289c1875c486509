"""Owns the last events of streams that may be resumed: how many bytes of them are held, and for how long. Pure.

A stream writes into its journal, whoever reads it. One follower at a time reads; a later one takes its place, since the earlier
is most often a connection that is dead and has not been noticed. A stream without a follower is given up after the window.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Protocol

from gateway.generation import RequestError
from shared.errors import ErrorCode

EVENT_OVERHEAD_BYTES: Final = 64


class Writing(Protocol):
    """A stream that is written into a journal."""

    def cancel(self) -> None:
        """Stop it in the worker. Idempotent."""


class Follower(Protocol):
    """Whoever is given a stream's events."""

    def take(self, number: int, event: bytes) -> None:
        """One more event. Never waits, never raises."""

    def over(self) -> None:
        """There will be no more."""

    def replaced(self) -> None:
        """Somebody else follows now."""


class Journal:
    """One stream's last events, numbered from 0."""

    __slots__ = (
        "ended",
        "events",
        "first",
        "follower",
        "idle_s",
        "is_forgotten",
        "is_live",
        "size_bytes",
        "stream",
        "stream_id",
        "tenant",
    )

    def __init__(self, stream_id: str, tenant: str, stream: Writing) -> None:
        self.stream_id = stream_id
        self.tenant = tenant
        self.stream = stream
        self.events: deque[bytes] = deque()
        self.first = 0  # the number of the oldest event held
        self.size_bytes = 0
        self.ended = False
        self.follower: Follower | None = None
        self.is_live = False  # the follower has all earlier events, and is given new ones as they come
        self.idle_s = 0.0  # since when nobody follows
        self.is_forgotten = False  # nobody can come back to it; what it still writes is dropped

    @property
    def next(self) -> int:
        """The number of the next event."""
        return self.first + len(self.events)

    def check(self, after: int, param: str) -> None:
        """Raises `RequestError` where the events that follow number `after` are not, or not all, held here."""
        if after >= self.next:
            message = f"{param}: the last event so far is {self.next - 1}"
        elif after + 1 < self.first:
            message = (
                f"{param}: events {after + 1} to {self.first - 1} are not held any more, only those from {self.first} on; "
                "send the request again"
            )
        else:
            return
        raise RequestError(ErrorCode.INVALID_REQUEST, message, param=param)

    def slice(self, start: int, max_bytes: int) -> list[bytes]:
        """Some events from number `start` on, at least one if there is any, about `max_bytes` at most.

        Raises `RequestError` SLOW_CLIENT where they were dropped meanwhile.
        """
        if start < self.first:
            raise RequestError(ErrorCode.SLOW_CLIENT, "the client reads more slowly than the stream grows")
        found: list[bytes] = []
        for index in range(start - self.first, len(self.events)):
            event = self.events[index]
            max_bytes -= len(event)
            if found and max_bytes < 0:
                break
            found.append(event)
        return found


@dataclass(slots=True)
class _Holdings:
    """What is held for one tenant."""

    size_bytes: int = 0
    journals: dict[str, Journal] = field(default_factory=dict)
    done: dict[Journal, None] = field(default_factory=dict)  # ended and followed by nobody, the oldest first


class Journals:
    """Every journal, by tenant and stream id: at most `stream_bytes` each and `total_bytes` in all.

    Where that is too little, room is made by whoever holds most: a tenant below an equal share loses nothing to the others.
    """

    def __init__(self, window_s: float, stream_bytes: int, total_bytes: int) -> None:
        self.window_s = window_s
        self.size_bytes = 0
        self._stream_bytes = stream_bytes
        self._total_bytes = total_bytes
        self._tenants: dict[str, _Holdings] = {}

    def __len__(self) -> int:
        return sum(len(tenant.journals) for tenant in self._tenants.values())

    def size_of(self, tenant: str) -> int:
        """Bytes held for a tenant."""
        held = self._tenants.get(tenant)
        return held.size_bytes if held is not None else 0

    @property
    def num_detached(self) -> int:
        """Streams under way that nobody follows."""
        return sum(journal.follower is None and not journal.ended for journal in self._all())

    def open(self, stream_id: str, tenant: str, stream: Writing, now_s: float) -> Journal:
        """A journal for a new stream."""
        journal = Journal(stream_id, tenant, stream)
        journal.idle_s = now_s
        self._tenants.setdefault(tenant, _Holdings()).journals[stream_id] = journal
        return journal

    def find(self, tenant: str, stream_id: str) -> Journal:
        """Raises `RequestError` NOT_FOUND, alike for what never was, what is gone and what is another's."""
        held = self._tenants.get(tenant)
        journal = held.journals.get(stream_id) if held is not None else None
        if journal is None:
            message = (
                "no stream of this id is held here; a stream is held only if it was asked for as resumable"
            )
            raise RequestError(ErrorCode.NOT_FOUND, message, param="id")
        return journal

    def write(self, journal: Journal, event: bytes) -> None:
        """One more event, whole."""
        if journal.is_forgotten:
            return
        number = journal.next
        journal.events.append(event)
        self._count(journal, len(event) + EVENT_OVERHEAD_BYTES)
        while journal.size_bytes > self._stream_bytes:
            self._drop_oldest(journal)
        if self.size_bytes > self._total_bytes:
            self._make_room(journal)
        if journal.is_live and journal.follower is not None:
            journal.follower.take(number, event)

    def end(self, journal: Journal, now_s: float) -> None:
        """The stream has ended; what is held of it stays for the window. Idempotent."""
        journal.ended = True
        journal.idle_s = now_s
        self._note_if_done(journal)
        if journal.is_live and journal.follower is not None:
            journal.follower.over()

    def attach(self, journal: Journal, follower: Follower, *, is_live: bool) -> None:
        """From now on `follower` follows; whoever did before is told."""
        before, journal.follower, journal.is_live = journal.follower, follower, is_live
        if not journal.is_forgotten:
            self._tenants[journal.tenant].done.pop(journal, None)
        if before is not None:
            before.replaced()

    def go_live(self, journal: Journal, follower: Follower) -> None:
        """The follower has all earlier events."""
        if journal.follower is follower:
            journal.is_live = True
            if journal.ended:
                follower.over()

    def detach(self, journal: Journal, follower: Follower, now_s: float) -> None:
        """The follower has left. No matter if another took its place."""
        if journal.follower is follower:
            journal.follower, journal.is_live, journal.idle_s = None, False, now_s
            self._note_if_done(journal)

    def forget(self, journal: Journal) -> None:
        """Hold nothing of it any more. Idempotent."""
        if journal.is_forgotten:
            return
        journal.is_forgotten = True
        self._count(journal, -journal.size_bytes)
        journal.first = journal.next
        journal.events.clear()
        held = self._tenants[journal.tenant]
        held.done.pop(journal, None)
        if held.journals.get(journal.stream_id) is journal:
            del held.journals[journal.stream_id]
        if not held.journals:
            del self._tenants[journal.tenant]

    def on_time(self, now_s: float) -> list[Journal]:
        """Forget what nobody followed for the window; returns those still under way, which are to be cancelled."""
        over = [
            journal
            for journal in self._all()
            if journal.follower is None and now_s - journal.idle_s >= self.window_s
        ]
        for journal in over:
            self.forget(journal)
        return [journal for journal in over if not journal.ended]

    def _all(self) -> list[Journal]:
        return [journal for tenant in self._tenants.values() for journal in tenant.journals.values()]

    def _make_room(self, writing: Journal) -> None:
        """Of the tenant who holds most, ended streams go first, the oldest before others; then events: the writing
        stream's own oldest, or, where another tenant makes room for it, those of that one's largest stream."""
        while self.size_bytes > self._total_bytes:
            own = held = self._tenants[writing.tenant]
            if own.size_bytes * len(self._tenants) <= self._total_bytes:
                held = max(self._tenants.values(), key=lambda tenant: tenant.size_bytes)
            if held.done:
                self.forget(next(iter(held.done)))
            elif held is own:
                self._drop_oldest(writing)
            else:
                self._drop_oldest(max(held.journals.values(), key=lambda journal: journal.size_bytes))

    def _note_if_done(self, journal: Journal) -> None:
        if journal.ended and journal.follower is None and not journal.is_forgotten:
            self._tenants[journal.tenant].done[journal] = None

    def _drop_oldest(self, journal: Journal) -> None:
        event = journal.events.popleft()
        journal.first += 1
        self._count(journal, -len(event) - EVENT_OVERHEAD_BYTES)

    def _count(self, journal: Journal, by_bytes: int) -> None:
        journal.size_bytes += by_bytes
        self._tenants[journal.tenant].size_bytes += by_bytes
        self.size_bytes += by_bytes
