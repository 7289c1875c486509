"""Owns who may enter: a bounded count of requests per worker and tenant, and honest waiting times. Pure.

Runs on the gateway's loop. A refusal costs one comparison and names the time after which a place should be
free, from the worker's measured drain rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.generation import RequestError
from shared.errors import ErrorCode

_RATE_WINDOW_S = 2.0
_MAX_RETRY_S = 60.0


@dataclass(slots=True)
class Occupancy:
    """One worker's places: how many are taken by requests of this gateway, and how fast the worker finishes them."""

    max_rows: int
    max_waiting: int
    num_active: int = 0
    reported_rate: float = 0.0
    tenants: dict[str, int] = field(default_factory=dict)
    _window_started_s: float = 0.0
    _num_finished: int = 0
    _measured_rate: float = 0.0

    @property
    def capacity(self) -> int:
        """Requests that the worker may hold, running and waiting."""
        return self.max_rows + self.max_waiting

    @property
    def num_free(self) -> int:
        """Places left."""
        return self.capacity - self.num_active

    @property
    def load(self) -> float:
        """The share of its places that are taken; 1 is full."""
        return self.num_active / max(1, self.capacity)

    @property
    def drain_rate(self) -> float:
        """Sequences finished per second: the worker's figure, else our own."""
        return self.reported_rate or self._measured_rate

    def enter(self, tenant: str) -> None:
        """Count one request in."""
        self.num_active += 1
        self.tenants[tenant] = self.tenants.get(tenant, 0) + 1

    def leave(self, tenant: str, now_s: float) -> None:
        """Count one request out."""
        self.num_active -= 1
        left = self.tenants.get(tenant, 0) - 1
        if left > 0:
            self.tenants[tenant] = left
        else:
            self.tenants.pop(tenant, None)
        # Only a saturated worker shows its rate; an idle one finishes as little as it was asked for.
        if self.num_active < self.max_rows:
            self._window_started_s = 0.0
        elif not self._window_started_s:
            self._window_started_s, self._num_finished = now_s, 0
        else:
            self._num_finished += 1
            elapsed_s = now_s - self._window_started_s
            if elapsed_s >= _RATE_WINDOW_S:
                self._measured_rate = self._num_finished / elapsed_s
                self._window_started_s = 0.0

    def on_beat(self, drain_rate: float, num_waiting: int) -> None:
        """Use the worker's own rate while requests wait there."""
        if num_waiting > 0 and drain_rate > 0:
            self.reported_rate = drain_rate

    def wait_s(self, num_ahead: int) -> float:
        """Seconds until `num_ahead` sequences have drained; 0 when the rate is not known yet."""
        return num_ahead / self.drain_rate if self.drain_rate > 0 and num_ahead > 0 else 0.0


class Admission:
    """The rule for taking a place."""

    def __init__(self, max_queue: int, max_wait_s: float, tenant_share: float = 1.0) -> None:
        """`tenant_share` is the part of a *full* worker one tenant may hold once others wait as well."""
        self.max_queue = max_queue
        self.max_wait_s = max_wait_s
        self.tenant_share = tenant_share

    def occupancy(self, max_rows: int, max_waiting: int) -> Occupancy:
        """The places of a worker with these bounds, cut to this gateway's own queue bound."""
        return Occupancy(max_rows, min(max_waiting, self.max_queue))

    def check(self, held: Occupancy, tenant: str, num_new: int = 1, num_ahead: int = 0) -> None:
        """Raises `RequestError` QUEUE_FULL when `num_new` more requests have no place beside `num_ahead` who come first."""
        if num_new > held.capacity:
            message = f"{num_new} sequences at once; this server holds at most {held.capacity}"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="n")
        total = held.num_active + num_ahead
        num_waiting = max(0, total + num_new - held.max_rows)
        if total + num_new > held.capacity:
            message = f"{total} requests are running or waiting, and there is room for {held.capacity}"
            raise _full(message, held.wait_s(total + num_new - held.capacity))
        wait_s = held.wait_s(num_waiting)
        if wait_s > self.max_wait_s:
            message = (
                f"the queue would take about {wait_s:.0f} s, more than the {self.max_wait_s:g} s allowed"
            )
            raise _full(message, wait_s - self.max_wait_s)
        others = len(held.tenants) - (tenant in held.tenants)
        if (
            others
            and num_waiting
            and held.tenants.get(tenant, 0) + num_new > self.tenant_share * held.capacity
        ):
            raise _full("your share of the queue is full while others wait", held.wait_s(num_new))


def _full(message: str, retry_after_s: float) -> RequestError:
    wait_s = min(_MAX_RETRY_S, max(0.1, retry_after_s or 1.0))
    return RequestError(ErrorCode.QUEUE_FULL, message, retry_after_s=wait_s)
