"""Owns the requests in flight on one worker: from its step frames to each listener. Runs on the gateway's loop.

This is the hot path: one frame carries one token for every row, and each token goes through its
`StreamState` straight into its listener's transport. One stream's fault (a listener that raises, a gap)
ends that stream and no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import structlog

from gateway.core.lending import Loans
from gateway.core.tokens import ByteDetokenizer
from gateway.decisions.limits import Meter
from gateway.decisions.recovery import Record
from gateway.decisions.stream import Discontinuity, StreamState
from gateway.faults import fault_fields
from gateway.generation import Delta, GenerateRequest, LendingListener, Listener, RequestError, TextListener
from gateway.native.burst import burst
from shared import protocol as wire
from shared.errors import ErrorCode

log = structlog.get_logger(__name__)


class FlightEvents(Protocol):
    """The events that the owner of all flights hears, for placement and metrics."""

    def on_started(self, flight: Flight) -> None:
        """A flight's first token arrived."""

    def on_token_gap(self, gap_s: float, count: int = 1) -> None:
        """Time between two tokens of one stream, or of `count` streams with the same."""

    def recall(self, flight: Flight) -> None:
        """The flight's stream is to come home, if the compiled loop writes it: its outcome is settled next."""

    def on_landed(self, flight: Flight) -> None:
        """The flight is over and in no map any more; its listener is told next."""

    def stop_sequence(self, flight: Flight) -> None:
        """The worker should stop the flight's sequence: the gateway has settled its outcome."""

    def on_turned_away(self, flight: Flight) -> bool:
        """The flight's worker is leaving and will not begin it. False: nobody else may take it, it ends."""


@dataclass(slots=True, eq=False)
class Staged:
    """What a flight waits for that has its place at a worker and is not sent yet, and what it has of that."""

    began_s: float
    missing: set[bytes]  # keys of pictures that are being encoded
    features: dict[bytes, bytes] = field(default_factory=dict)  # by key


class Flight:
    """One accepted request on its way. Also the `RunningStream` handle its interface holds."""

    __slots__ = (
        "_events",
        "deadline_s",
        "has_shown",
        "listener",
        "meter",
        "record",
        "request",
        "request_id",
        "sequence_id",
        "staged",
        "started_s",
        "state",
        "worker_key",
    )

    def __init__(
        self,
        request: GenerateRequest,
        listener: Listener,
        state: StreamState,
        events: FlightEvents,
        *,
        started_s: float,
        deadline_s: float,
        meter: Meter | None = None,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.listener = listener
        self.state = state
        self.started_s = started_s
        self.deadline_s = deadline_s
        self.sequence_id = 0
        self.worker_key: int | None = None  # the worker holding it; None while it waits for one
        self.has_shown = False  # its client was given a part of the answer, which cannot be sent again
        self.record = Record()  # of the workers it lost
        self.staged: Staged | None = None  # set while it is not sent yet
        self.meter = meter  # of the key it was asked with
        self._events = events

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.request.tenant

    @property
    def landed(self) -> bool:
        """Whether its terminal event was delivered."""
        return self.state.end is not None

    def show(self) -> None:
        """A part of the answer goes to its client."""
        if not self.has_shown:
            self.has_shown = True
            if self.request.images:  # megabytes of pixels, which were kept only for another attempt
                self.request = replace(self.request, images=[])

    def cancel(self) -> None:
        """See `RunningStream.cancel`."""
        self._events.recall(self)
        if self.state.end is None:
            self._events.stop_sequence(self)
            self.state.cancel()
            self.land()

    def fail(self, error: RequestError) -> None:
        """End the flight with an error, unless it has ended."""
        self._events.recall(self)
        if self.state.end is None:
            self.state.fail(error)
            self.land()

    def land(self) -> None:
        """Take the flight off the maps and tell its listener; `state.end` is set. Called once."""
        assert self.state.end is not None
        self._events.on_landed(self)
        try:
            self.listener.on_end(self.state.end)
        except ConnectionError:
            pass  # the client left first
        except Exception as fault:
            log.error("listener_failed", request_id=self.request_id, **fault_fields(fault))


class _Plain:
    """What a token of a plain stream needs, and nothing else: with many streams each object is one more cache miss."""

    __slots__ = ("can_be_lent", "detokenizer", "listener", "state")

    def __init__(self, state: StreamState, listener: TextListener) -> None:
        self.state = state
        self.detokenizer = state.detokenizer
        self.listener = listener
        self.can_be_lent = hasattr(listener, "form") and isinstance(state.detokenizer, ByteDetokenizer)


def _rows(outputs: wire.StepOutputs, some: list[int] | None) -> Iterable[tuple[int, int, int]]:
    """Sequence id, index and token of every row, or of some."""
    ids = wire.unpack_i64(outputs.sequence_ids)
    first = wire.unpack_i32(outputs.first_index)
    token_ids = wire.unpack_i32(outputs.token_ids)
    if some is None:
        return zip(ids, first, token_ids, strict=True)
    return [(ids[i], first[i], token_ids[i]) for i in some]


class Flights:
    """The flights on one worker, by sequence id."""

    def __init__(
        self,
        events: FlightEvents,
        note: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
        *,
        is_compiled: bool = False,
    ) -> None:
        """`is_compiled`: tokens are written by the compiled loop where there is one."""
        self._is_compiled = is_compiled
        self._events = events
        self._note = note
        self._now = now
        self.by_id: dict[int, Flight] = {}
        self._plain: dict[int, _Plain] = {}  # those of them whose tokens are text and nothing else
        self._loans: Loans | None = None  # those of them that the compiled loop writes, once there is one

    def remove(self, sequence_id: int) -> bool:
        """Take a flight off; False where it is not here."""
        self.recall(sequence_id)
        self._plain.pop(sequence_id, None)
        return self.by_id.pop(sequence_id, None) is not None

    def recall(self, sequence_id: int) -> None:
        """Have a stream that the compiled loop writes come home."""
        if self._loans is not None:
            self._loans.recall(sequence_id)

    def on_token_gap(self, gap_s: float, count: int = 1) -> None:
        """See `LoanEvents`."""
        self._events.on_token_gap(gap_s, count)

    def on_fault(self, sequence_id: int, fault: Exception) -> None:
        """See `LoanEvents`."""
        if (flight := self.by_id.get(sequence_id)) is not None:
            self._on_listener_fault(flight, fault)

    def on_outputs(self, outputs: wire.StepOutputs) -> None:
        """Deliver one step. Raises ValueError for a frame whose arrays do not fit together."""
        sizes = (len(outputs.sequence_ids) / 8, len(outputs.first_index) / 4, len(outputs.token_ids) / 4)
        if not sizes[0] == sizes[1] == sizes[2] == int(sizes[0]):
            raise ValueError("{:g} ids, {:g} indexes and {:g} tokens in one frame".format(*sizes))
        values = {item.sequence_id: item for item in outputs.values} if outputs.values else None
        logprobs = {item.sequence_id: item for item in outputs.logprobs} if outputs.logprobs else None
        now_s = self._now()
        by_id, plains = self.by_id, self._plain
        for scores in outputs.prompt_logprobs:
            if (flight := by_id.get(scores.sequence_id)) is not None:
                flight.state.on_prompt(scores)
        loans = self._loans
        if loans is None and self._is_compiled and (compiled := burst()) is not None:
            loans = self._loans = Loans(compiled, self)
        left = loans.step(outputs, now_s) if loans else None
        rows = () if left is not None and not left else _rows(outputs, left)
        usual_s, num_usual = 0.0, 0  # streams of one worker mostly had their last tokens at the same time
        for sequence_id, index, token_id in rows:
            plain = plains.get(sequence_id)
            if plain is None or index != (state := plain.state).next_index:
                flight = by_id.get(sequence_id)
                if flight is None:
                    continue  # cancelled here, and the cancel crossed this frame on the wire
                self._on_token(
                    flight,
                    index,
                    token_id,
                    now_s,
                    None if values is None else values.get(sequence_id),
                    None if logprobs is None else logprobs.get(sequence_id),
                )
                continue
            gap_s = now_s - state.last_s
            if gap_s == usual_s:
                num_usual += 1
            else:
                if num_usual:
                    self._events.on_token_gap(usual_s, num_usual)
                usual_s, num_usual = gap_s, 1
            state.next_index = index + 1
            state.last_s = now_s
            text = plain.detokenizer.step(token_id)
            if text:
                try:
                    plain.listener.on_text(text)
                except Exception as fault:
                    self._on_listener_fault(by_id[sequence_id], fault)
                    continue
            if index & 3 == 2 and plain.can_be_lent and loans is not None:
                # Not at once: many answers are shorter than lending them would take.
                listener = cast(LendingListener, plain.listener)
                loans.offer(sequence_id, state, listener, cast(ByteDetokenizer, plain.detokenizer))
        if num_usual:
            self._events.on_token_gap(usual_s, num_usual)
        for finish in outputs.finishes:
            flight = by_id.get(finish.sequence_id)
            if flight is not None and not self._is_elsewhere(flight, finish.code):
                self._on_finish(flight, finish)

    def on_rejected(self, rejected: wire.Rejected) -> None:
        """End one flight with the worker's refusal."""
        flight = self.by_id.get(rejected.sequence_id)
        if flight is not None and not self._is_elsewhere(flight, rejected.code):
            message = rejected.message or f"the worker refused this request: {rejected.code.value}"
            param = rejected.param or None
            wait_s = rejected.retry_after_s
            flight.fail(RequestError(rejected.code, message, param=param, retry_after_s=wait_s))

    def _is_elsewhere(self, flight: Flight, code: ErrorCode | None) -> bool:
        """Whether a flight that a leaving worker never began goes to another one, now or later."""
        is_unbegun = code is ErrorCode.SHUTTING_DOWN and flight.state.next_index == 0
        return is_unbegun and self._events.on_turned_away(flight)

    def _on_token(
        self,
        flight: Flight,
        index: int,
        token_id: int,
        now_s: float,
        values: wire.TokenValues | None,
        logprobs: wire.TokenLogprobs | None,
    ) -> None:
        state = flight.state
        last_s = state.last_s
        try:
            event = state.on_token(index, token_id, now_s, values, logprobs)
        except Discontinuity as fault:
            if not fault.is_gap:
                self._note("duplicate_token")
                return
            self._note("token_gap")
            self._events.stop_sequence(flight)
            flight.fail(RequestError(ErrorCode.STREAM_GAP, "generated tokens were lost on the way"))
            return
        if index == 0:
            self._events.on_started(flight)
        else:
            self._events.on_token_gap(now_s - last_s)
        if event is not None:
            flight.show()
            try:
                if isinstance(event, Delta):
                    flight.listener.on_delta(event)
                    if state.is_plain and hasattr(flight.listener, "on_text"):
                        listener = cast(TextListener, flight.listener)
                        self._plain[flight.sequence_id] = _Plain(state, listener)
                else:
                    flight.listener.on_object(event)
            except Exception as fault:
                self._on_listener_fault(flight, fault)
                return
        if state.end is not None:
            self._settle(flight)

    def _on_finish(self, flight: Flight, finish: wire.Finish) -> None:
        self.recall(flight.sequence_id)
        state = flight.state
        delta = state.on_finish(finish)
        if delta is not None:
            flight.show()
            try:
                flight.listener.on_delta(delta)
            except Exception as fault:
                if not isinstance(fault, ConnectionError):
                    log.error("listener_failed", request_id=flight.request_id, **fault_fields(fault))
        error = state.end.error if state.end is not None else None
        if error is not None and error.code is ErrorCode.STREAM_GAP:
            self._note("token_gap")
        self._land(flight)

    def _on_listener_fault(self, flight: Flight, fault: Exception) -> None:
        """A transport that raises has lost its client, or has a bug; either way only its stream ends."""
        if not isinstance(fault, ConnectionError):
            self._note("listener_failed")
            log.error("listener_failed", request_id=flight.request_id, **fault_fields(fault))
        if flight.landed:
            self._settle(flight)
        else:
            flight.cancel()

    def _settle(self, flight: Flight) -> None:
        """Land a flight that a stop string ended before the worker did, and have the worker stop it."""
        if flight.sequence_id in self.by_id:
            self._events.stop_sequence(flight)
            flight.land()

    def _land(self, flight: Flight) -> None:
        """Land a flight whose state has ended, unless its listener cancelled it meanwhile."""
        if flight.sequence_id in self.by_id:
            flight.land()
