"""Owns the workers that are there: those of the configuration, and those that come and go under a name. Gateway's loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Final

from gateway.core.discovery import SCHEMES, Discovery
from gateway.core.placement import Placement, Worker
from gateway.core.worker_link import WorkerLink

Make = Callable[[int, str], Worker]


class WorkerPool:
    """Makes, opens, closes and finds workers; `Placement` holds them. `make` builds one from a key and an endpoint."""

    def __init__(self, placement: Placement, make: Make, *, interval_s: float) -> None:
        self._placement = placement
        self._make: Final = make
        self._interval_s = interval_s
        self._by_link: dict[WorkerLink, Worker] = {}
        self._users: dict[str, int] = {}  # by endpoint: how many entries of the configuration stand for it
        self._names: list[Discovery] = []

    def start(self, entries: tuple[str, ...]) -> None:
        """Reach for every worker. Raises `shared.settings.ConfigError` for bad keys."""
        for entry in entries:
            if not entry.startswith(SCHEMES):
                self._join(entry)
                continue
            discovery = Discovery(
                entry,
                interval_s=self._interval_s,
                join=self._join,
                leave=self._leave,
                is_idle=self._is_idle,
            )
            self._names.append(discovery)
            discovery.start()

    def stop(self) -> None:
        """Close every link. Idempotent."""
        for name in self._names:
            name.stop()
        for worker in self._placement.workers:
            worker.link.close()

    def of(self, link: WorkerLink) -> Worker:
        """The worker at the other end of a link."""
        return self._by_link[link]

    @property
    def problem(self) -> str:
        """Why names have no workers, if so."""
        return next((name.problem for name in self._names if name.problem), "")

    def _find(self, endpoint: str) -> Worker | None:
        return next((w for w in self._placement.workers if w.link.endpoint == endpoint), None)

    def _join(self, endpoint: str) -> None:
        self._users[endpoint] = self._users.get(endpoint, 0) + 1
        if self._users[endpoint] > 1:
            return
        key = next(key for key in count() if key not in self._placement.by_key)
        worker = self._make(key, endpoint)
        self._by_link[worker.link] = worker
        self._placement.add(worker)
        worker.link.open()

    def _leave(self, endpoint: str) -> None:
        self._users[endpoint] -= 1
        if self._users[endpoint]:
            return
        del self._users[endpoint]
        worker = self._find(endpoint)
        assert worker is not None
        worker.link.close()
        self._placement.remove(worker)
        del self._by_link[worker.link]

    def _is_idle(self, endpoint: str) -> bool:
        worker = self._find(endpoint)
        return worker is None or (worker.link.ready is None and not worker.flights.by_id)
