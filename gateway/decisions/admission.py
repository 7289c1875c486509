"""Owns who may enter: a bounded count of requests per worker and tenant, and honest waiting times. Pure.

Runs on the gateway's loop. A refusal costs one comparison and names the time after which a place should be
free, from the worker's measured drain rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.generation import RequestError
from shared.errors import ErrorCode

_RATE_WINDOW_S = 2.0
_MAX_RETRY_S = 60.0
_KEPT_FREE = (
    8  # the part of an equal share that a gateway, or a tenant, with more leaves free for each of the others
)


@dataclass(slots=True)
class Occupancy:
    """One worker's places: how many are taken by requests of this gateway, and how fast the worker finishes them."""

    max_rows: int
    max_waiting: int
    num_active: int = 0
    reported_rate: float = 0.0
    num_others: int = 0  # requests that other gateways hold at the worker, as it last said
    bound: int = -1  # how many places this gateway may hold just now; negative: all
    num_gateways: int = 1  # at least so many share the places, whatever the worker knows of them
    num_sharing: int = 1  # so many share them just now
    tenants: dict[str, int] = field(default_factory=dict)
    _window_started_s: float = 0.0
    _num_finished: int = 0
    _measured_rate: float = 0.0

    @property
    def capacity(self) -> int:
        """Requests that the worker may hold, running and waiting."""
        return self.max_rows + self.max_waiting

    @property
    def limit(self) -> int:
        """Places that this gateway may take of the worker's: all, unless it shares them."""
        return self.capacity if self.bound < 0 else self.bound

    @property
    def part(self) -> int:
        """Places that are this gateway's when all ask for more than there are."""
        return -(-self.capacity // self.num_sharing)

    @property
    def few(self) -> int:
        """Places that are left to tenants who hold none."""
        return max(1, self.part // (4 * _KEPT_FREE))

    @property
    def num_free(self) -> int:
        """Places left to this gateway."""
        return self.limit - self.num_active

    @property
    def load(self) -> float:
        """The share of its places that are taken; 1 is full."""
        return (self.num_active + self.num_others) / max(1, self.capacity)

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

    def share(self, num_gateways: int, num_held: int) -> None:
        """Take this gateway's part of what is free, of `num_held` places that all gateways hold together.

        Told at every heartbeat. Each gateway takes at most its part of the free places until the next one, so that all
        together keep the bound. Whoever holds more than an equal share borrows, and keeps a few places free for those
        who hold less: they begin there, and while they take those it gives back what drains, until shares are equal.
        """
        num_gateways = max(num_gateways, self.num_gateways)
        if num_gateways < 2 and (self.num_active or not num_held):
            self.num_sharing, self.num_others, self.bound = 1, 0, -1
            return
        # Whoever holds none where some are held is not alone, though the worker has never heard it ask.
        self.num_sharing = num_gateways = max(2, num_gateways)
        self.num_others = max(0, num_held - self.num_active)
        num_free = self.capacity - self.num_active - self.num_others  # below 0: all hold too many
        num_kept = (num_gateways - 1) * max(1, self.part // _KEPT_FREE)
        if self.num_active < self.part:
            num_more = -(-max(0, num_free) // num_gateways)
            # Even where none is free: only by asking does it become known to the others.
            self.bound = self.num_active + (num_more or int(not self.num_active))
        elif num_free >= num_kept:
            self.bound = self.num_active + (num_free - num_kept) // num_gateways
        else:
            self.bound = max(self.part, self.num_active - (num_kept - num_free))

    def wait_s(self, num_ahead: int) -> float:
        """Seconds until `num_ahead` sequences have drained; 0 when the rate is not known yet."""
        return num_ahead / self.drain_rate if self.drain_rate > 0 and num_ahead > 0 else 0.0


class Admission:
    """The rule for taking a place."""

    def __init__(
        self,
        max_queue: int,
        max_wait_s: float,
        num_gateways: int = 1,
        num_tenants: Callable[[], int] = lambda: 1,
    ) -> None:
        """`num_tenants` says how many there are, whether they ask or not."""
        self.num_gateways = num_gateways
        self.max_queue = max_queue
        self.max_wait_s = max_wait_s
        self._num_tenants = num_tenants

    def occupancy(self, max_rows: int, max_waiting: int) -> Occupancy:
        """The places of a worker with these bounds, cut to this gateway's own queue bound."""
        places = Occupancy(max_rows, min(max_waiting, self.max_queue), num_gateways=self.num_gateways)
        places.share(1, 0)
        return places

    def check(self, held: Occupancy, tenant: str, num_new: int = 1, num_ahead: int = 0) -> None:
        """Raises `RequestError` QUEUE_FULL when `num_new` more requests have no place beside `num_ahead` who come first."""
        if num_new > held.capacity:
            message = f"{num_new} sequences at once; this server holds at most {held.capacity}"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param="n")
        total = held.num_active + num_ahead
        if total + held.num_others + num_new <= held.max_rows and total + num_new <= held.limit:
            return  # it would run at once
        num_waiting = max(0, total + held.num_others + num_new - held.max_rows)
        if total + num_new > held.limit:
            message = f"{total + held.num_others} requests are running or waiting, and there is room for {held.capacity}"
            raise _full(message, held.wait_s(max(1, total + held.num_others + num_new - held.capacity)))
        wait_s = held.wait_s(num_waiting)
        if wait_s > self.max_wait_s:
            message = (
                f"the queue would take about {wait_s:.0f} s, more than the {self.max_wait_s:g} s allowed"
            )
            raise _full(message, wait_s - self.max_wait_s)
        if num_waiting:
            self._check_share(held, tenant, num_new, total)

    def _check_share(self, held: Occupancy, tenant: str, num_new: int, total: int) -> None:
        """Whoever holds more than an equal share borrows, and leaves some places free for tenants who hold less: they begin
        there, and gain whatever drains until shares are equal, as gateways do among themselves (`Occupancy.share`). A few
        places are left for tenants who hold none, by all who hold more than a few."""
        num_asking = len(held.tenants.keys() | {tenant})
        num_known = max(self._num_tenants(), num_asking)
        num_own = held.tenants.get(tenant, 0) + num_new
        few = held.few
        num_kept = 0
        if num_known > 1 and num_own > held.part // max(2, num_asking):
            num_kept = max(few, held.part // (2 * _KEPT_FREE))
        elif num_known > num_asking and num_own > few:
            num_kept = few
        if held.limit - total - num_new < num_kept:
            message = "you hold more of the places than others, and the last ones are kept for them"
            raise _full(message, held.wait_s(num_new))


def _full(message: str, retry_after_s: float) -> RequestError:
    wait_s = min(_MAX_RETRY_S, max(0.1, retry_after_s or 1.0))
    return RequestError(ErrorCode.QUEUE_FULL, message, retry_after_s=wait_s)
