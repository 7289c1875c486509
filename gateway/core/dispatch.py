"""Owns every request from its acceptance to its one end: sending, retries, deadlines. Gateway's loop.

A request has exactly one `Flight`, on one worker or waiting for one. Flights, workers' links (through
`gateway.core.service`) and a timer tell `Dispatch` what happens to it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from itertools import count
from typing import Final

import structlog

from gateway.config import GatewayConfig
from gateway.core.catalog import Catalog
from gateway.core.encoders import Encoders, deadly
from gateway.core.flights import Flight
from gateway.core.metrics import Metrics
from gateway.core.placement import Placement, Worker
from gateway.core.prefills import Prefills
from gateway.core.tracing import Tracing
from gateway.decisions.affinity import content_key
from gateway.decisions.limits import Meter
from gateway.decisions.recovery import Recovery, Verdict
from gateway.faults import fault_fields
from gateway.generation import GenerateRequest, Listener, RequestError
from shared import protocol as wire
from shared.errors import ErrorCode

_TICK_S: Final = 0.25
_DEADLINE_GRACE_S: Final = 2.0  # the worker ends a late sequence itself, with its own finish reason

log = structlog.get_logger(__name__)


class Dispatch:
    """The flights under way. Implements `gateway.core.flights.FlightEvents`."""

    def __init__(
        self,
        config: GatewayConfig,
        catalog: Catalog,
        placement: Placement,
        metrics: Metrics,
        tracing: Tracing | None,
        now: Callable[[], float],
    ) -> None:
        self.flights: dict[Flight, None] = {}  # every unlanded one, oldest first
        self.recovery: Recovery[Flight] = Recovery(config.retry_wait_s)
        self.idle = asyncio.Event()
        self.idle.set()
        self._max_deadline_s = config.request_deadline_s
        self._catalog = catalog
        self._placement = placement
        self._workers = placement.by_key
        self._metrics = metrics
        self._tracing = tracing
        self._now = now
        self._sequence_ids = count(secrets.randbits(30) << 20)
        self.encoders = Encoders(placement, metrics, self, now, self._sequence_ids.__next__)
        self.prefills = Prefills(placement, metrics.prefills, config.prefill_tokens)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the timer; call once, on the running loop."""
        self._tick()

    def stop(self) -> None:
        """Stop the timer. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def submit(self, request: GenerateRequest, listener: Listener, meter: Meter | None = None) -> Flight:
        """Admit and send to a worker. Raises `RequestError`. `meter` counts for the key that was used."""
        model = self._catalog.current(request.model)
        model.check(request)
        key = self._content_key(request)
        worker = self._placement.place(model, request.tenant, 1, key)
        now_s = self._now()
        deadline_s = min(request.deadline_s or self._max_deadline_s, self._max_deadline_s)
        flight = Flight(
            request,
            listener,
            model.stream(request, now_s),
            self,
            started_s=now_s,
            deadline_s=now_s + deadline_s,
            meter=meter,
        )
        num_prompt = request.num_prompt if meter else 0
        if meter is not None:
            meter.on_submit(num_prompt, now_s)
        try:
            self._send(flight, worker)
        except RequestError:
            if meter is not None:
                meter.take_back(num_prompt, now_s)
            raise
        self.flights[flight] = None
        self.idle.clear()
        self._metrics.on_accepted(model.card.model_id)
        if self._tracing is not None:
            self._tracing.begin(flight)
        return flight

    def _content_key(self, request: GenerateRequest) -> bytes | None:
        """What says where the request belongs; None where there is no choice."""
        if len(self._placement.workers) < 2:
            return None
        digests = [image.spec.digest for image in request.images]
        return content_key(request.tenant, digests, request.prompt_ids)

    def end_all(self, error: RequestError) -> int:
        """End every flight with this error; returns how many there were."""
        flights = list(self.flights)
        for flight in flights:
            self.stop_sequence(flight)
            flight.fail(error)
        return len(flights)

    def _send(self, flight: Flight, worker: Worker) -> None:
        """Put a flight on a worker. After a `RequestError` the flight is on no worker and does not wait for one."""
        sequence_id = next(self._sequence_ids)
        if not self.encoders.begin(flight, worker):
            self._submit(flight, worker, sequence_id)
        worker.hold(flight, sequence_id)

    def _submit(self, flight: Flight, worker: Worker, sequence_id: int) -> None:
        """Send it with its pictures, as they are now. Raises `RequestError`."""
        encoded, frames = self.encoders.take(flight)
        prefill_at = self.prefills.choose(flight, worker)
        deadline_s = max(0.001, flight.deadline_s - self._now())
        try:
            worker.send(flight, sequence_id, deadline_s, encoded, frames, prefill_at)
        except RequestError:
            self.prefills.forget(flight)
            raise
        self.encoders.on_sent(flight, worker)

    # ------------------------------------------------------------ told by encoders

    def on_encoded(self, flight: Flight) -> None:
        """See `EncoderEvents`: the flight has its place, and is sent now."""
        assert flight.worker_key is not None
        try:
            self._submit(flight, self._workers[flight.worker_key], flight.sequence_id)
        except RequestError as error:
            if error.code not in (ErrorCode.QUEUE_FULL, ErrorCode.WORKER_LOST):
                flight.fail(error)
                return
            self._take_off(flight)
            flight.record.lost_s = flight.record.unserved_s = self._now()
            self.recovery.put_back(flight)
            self._note_recovery()

    def on_deadly(self, flight: Flight) -> None:
        """See `EncoderEvents`."""
        flight.fail(deadly())

    # ------------------------------------------------------------ told by flights

    def on_started(self, flight: Flight) -> None:
        """See `FlightEvents`."""
        self._metrics.on_first_token(self._now() - flight.started_s)
        self.prefills.forget(flight)
        self._on_settled(flight)

    def _on_settled(self, flight: Flight) -> None:
        """A flight showed a token, or ended."""
        if not flight.record.has_lost and not len(self.recovery):
            return
        is_over = self.recovery.on_settled(flight)
        self._note_recovery()
        if is_over:
            self.resume()

    def on_token_gap(self, gap_s: float, count: int = 1) -> None:
        """See `FlightEvents`."""
        self._metrics.on_token_gap(gap_s, count)

    def recall(self, flight: Flight) -> None:
        """See `FlightEvents`."""
        if flight.worker_key is not None:
            self._workers[flight.worker_key].flights.recall(flight.sequence_id)

    def on_landed(self, flight: Flight) -> None:
        """See `FlightEvents`."""
        self._take_off(flight)
        self.flights.pop(flight, None)
        if not self.flights:
            self.idle.set()
        assert flight.state.end is not None
        now_s = self._now()
        elapsed_s = now_s - flight.started_s
        self._metrics.on_end(flight.state.end, elapsed_s)
        request = flight.request
        self._metrics.ledger.on_end(request.model.card.model_id, request.tenant, flight.state.end.usage)
        if flight.meter is not None:
            flight.meter.on_end(flight.state.end.usage, now_s)
        if self._tracing is not None:
            self._tracing.end(flight, flight.state.end, elapsed_s)
        self._on_settled(flight)

    def stop_sequence(self, flight: Flight) -> None:
        """See `FlightEvents`."""
        if flight.worker_key is not None:
            self._workers[flight.worker_key].link.cancel([flight.sequence_id])

    def _take_off(self, flight: Flight) -> None:
        self.encoders.forget(flight)
        self.prefills.forget(flight)
        if flight.worker_key is None:
            return
        worker = self._workers[flight.worker_key]
        if worker.flights.remove(flight.sequence_id):
            worker.occupancy.leave(flight.request.tenant, self._now())
        flight.worker_key = None

    # ------------------------------------------------------------ losses, retries and deadlines

    def on_lost(self, worker: Worker, error: RequestError) -> None:
        """A worker is lost: streams that began end here, its other requests are tried again (see `Recovery`)."""
        crashed = not worker.link.was_silent
        draining = self._placement.draining
        held = list(worker.flights.by_id.values())
        worker.orphans = list(worker.flights.by_id)
        unsent = [flight for flight in held if flight.staged is not None]
        lost = [flight for flight in held if flight.staged is None]
        for flight in held:
            self._take_off(flight)
        self.encoders.on_lost(worker, crashed=crashed)
        for flight in unsent:  # nothing speaks against them, and nothing of them was there
            if draining:
                flight.fail(error)
            else:
                flight.record.lost_s = flight.record.unserved_s = self._now()
                self.recovery.put_back(flight)
        unstarted = [flight for flight in lost if not flight.has_shown]
        verdicts = (
            []
            if draining
            else self.recovery.on_loss(unstarted, self._now(), num_held=len(lost), crashed=crashed)
        )
        retried = {flight for flight, verdict in verdicts if verdict is Verdict.RETRY}
        guilty = {flight for flight, verdict in verdicts if verdict is Verdict.QUARANTINE}
        if self._placement.reserved is worker:
            self._placement.reserved = None
        self._note_recovery()
        for flight in lost:
            if flight in guilty:
                message = "its worker crashed each time this request was started; it will not be tried again"
                flight.fail(RequestError(ErrorCode.QUARANTINED, message))
            elif flight not in retried:
                flight.fail(error)
        if lost:
            log.warning(
                "flights_lost",
                num_ended=len(lost) - len(retried),
                num_retried=len(retried),
                num_quarantined=len(guilty),
            )
        if not worker.link.was_leaving:
            self._metrics.on_worker_lost()
        self.resume()

    def on_rejected(self, worker: Worker, rejected: wire.Rejected) -> None:
        """A worker has no place for a request that was accepted here before: it waits again. Others end."""
        flight = worker.flights.by_id.get(rejected.sequence_id)
        if flight is None or rejected.code is not ErrorCode.QUEUE_FULL or flight.record.num_attempts < 2:
            worker.flights.on_rejected(rejected)
            return
        self._take_off(flight)
        flight.record.num_attempts -= 1
        self.recovery.put_back(flight)
        self._note_recovery()

    def on_turned_away(self, flight: Flight) -> bool:
        """See `FlightEvents`. Nothing speaks against the flight: it goes at once if there is a worker."""
        if self._placement.draining or flight.worker_key is None:
            return False
        self._workers[flight.worker_key].is_leaving = True
        self._take_off(flight)
        flight.record.num_attempts -= 1
        flight.record.lost_s = flight.record.unserved_s = self._now()
        if not self._send_again(flight):
            self._note_recovery()
        return True

    def resume(self) -> None:
        """Send those whose turn it is to be tried again, as far as workers have room for them."""
        while batch := self.recovery.next_round(self._now()):
            num_sent = sum(self._send_again(flight) for flight in batch)
            self._note_recovery()
            if num_sent < len(batch):
                return  # the timer tries again

    def _send_again(self, flight: Flight) -> bool:
        """False: it has to wait. Otherwise it is on a worker, or has ended."""
        try:
            model = self._catalog.current(flight.request.model)
        except RequestError:
            message = "the worker died, and another model took its place"
            return self._end_again(flight, RequestError(ErrorCode.WORKER_LOST, message))
        waited_s = self._now() - flight.record.lost_s
        worker = self._placement.place_again(model, is_suspect=flight.record.level > 0, waited_s=waited_s)
        if worker is not None:
            try:
                self._send(flight, worker)
            except RequestError as error:
                if error.code not in (ErrorCode.QUEUE_FULL, ErrorCode.WORKER_LOST):
                    return self._end_again(flight, error)
            else:
                flight.state = model.stream(flight.request, flight.started_s)
                return True
        self.recovery.put_back(flight)
        return False

    def _end_again(self, flight: Flight, error: RequestError) -> bool:
        self.recovery.on_settled(flight)
        flight.fail(error)
        return True

    def _note_recovery(self) -> None:
        """Newcomers' places depend on who waits here, and on whether there is anybody suspicious."""
        self._placement.num_returning = len(self.recovery)
        if not self.recovery.has_suspects:
            self._placement.reserved = None

    def _is_served(self, flight: Flight) -> bool:
        return self._placement.serves(flight.request.model.card.model_id)

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        try:
            now_s = self._now()
            self.recovery.on_time(now_s)
            for flight in self.recovery.expired(now_s, self._is_served):
                flight.fail(RequestError(ErrorCode.WORKER_LOST, "the worker died and none took its place"))
            late = [f for f in self.flights if now_s > f.deadline_s + _DEADLINE_GRACE_S]
            for flight in late:
                self.stop_sequence(flight)
                allowed_s = flight.deadline_s - flight.started_s
                message = f"the request was not finished after {allowed_s:g} s"
                flight.fail(RequestError(ErrorCode.DEADLINE_EXCEEDED, message))
            self.resume()
            self._note_recovery()
        except Exception as fault:  # an error in one tick must not stop the timer
            log.error("dispatch_tick_failed", **fault_fields(fault))
