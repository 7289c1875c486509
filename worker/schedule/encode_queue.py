"""Owns the pictures that wait to be encoded for other workers, and whose is next. Pure; decode thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from worker.schedule.sequence import Picture

Key = tuple[bytes, int]
"""Gateway, and the number it gave the picture."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodeJob:
    """One picture that a gateway asked for."""

    gateway: bytes
    job_id: int
    tenant: str
    picture: Picture

    @property
    def key(self) -> Key:
        """Unlike any other job's."""
        return self.gateway, self.job_id


class EncodeQueue:
    """Tenants in turn, each one's oldest picture first: who sends a hundred pictures delays only his own."""

    def __init__(self, max_jobs: int) -> None:
        self.max_jobs = max_jobs
        self._jobs: dict[Key, EncodeJob] = {}
        self._tenants: dict[str, deque[EncodeJob]] = {}  # in the order of their turns; none of them empty

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, key: Key) -> bool:
        return key in self._jobs

    @property
    def is_full(self) -> bool:
        """Whether another picture is refused."""
        return len(self._jobs) >= self.max_jobs

    def put(self, job: EncodeJob) -> None:
        """One more picture; there is room, and it is not here yet."""
        assert not self.is_full and job.key not in self._jobs
        self._jobs[job.key] = job
        self._tenants.setdefault(job.tenant, deque()).append(job)

    def take(self) -> EncodeJob | None:
        """The next picture, which is then gone from here; None where none waits."""
        tenant = next(iter(self._tenants), None)
        if tenant is None:
            return None
        job = self._tenants[tenant][0]
        self.drop(job.key)
        if tenant in self._tenants:  # behind the others
            self._tenants[tenant] = self._tenants.pop(tenant)
        return job

    def drop(self, key: Key) -> None:
        """Nobody waits for this picture any more. Does nothing where it is not here."""
        job = self._jobs.pop(key, None)
        if job is None:
            return
        own = self._tenants[job.tenant]
        own.remove(job)
        if not own:
            del self._tenants[job.tenant]

    def drop_gateway(self, gateway: bytes) -> None:
        """A gateway is gone."""
        for key in [key for key in self._jobs if key[0] == gateway]:
            self.drop(key)
