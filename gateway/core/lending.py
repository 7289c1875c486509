"""Owns which streams are with the compiled loop, and brings them home. Runs on the gateway's loop.

A stream is lent while its tokens are text and nothing else and nobody else writes to its connection. Whoever is about to
do anything else with it, or with the connection, has it come home first; then its listener writes again as if it had all the
time, and after a few tokens it may be lent anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gateway.core.tokens import ByteDetokenizer
from gateway.decisions.stream import StreamState
from gateway.generation import LendingListener
from gateway.native.burst import Burst, TokenTextTable
from shared import protocol as wire


class LoanEvents(Protocol):
    """Who hears of what happened to lent streams."""

    def on_token_gap(self, gap_s: float, count: int = 1) -> None:
        """See `gateway.core.flights.FlightEvents`."""

    def on_fault(self, sequence_id: int, fault: Exception) -> None:
        """A listener that got its stream back raised."""


class Loan:
    """One lent stream; see `gateway.generation.Carrier`."""

    __slots__ = ("_loans", "detokenizer", "listener", "sequence_id", "state")

    def __init__(
        self,
        loans: Loans,
        sequence_id: int,
        state: StreamState,
        listener: LendingListener,
        detokenizer: ByteDetokenizer,
    ) -> None:
        self._loans = loans
        self.sequence_id = sequence_id
        self.state = state
        self.listener = listener
        self.detokenizer = detokenizer

    def come_home(self) -> None:
        """See `Carrier`."""
        self._loans.recall(self.sequence_id)

    def written_bytes(self) -> int:
        """See `Carrier`."""
        return self._loans.written_bytes(self.sequence_id)


class Loans:
    """The lent streams of one worker, by sequence id."""

    def __init__(self, burst: Burst, events: LoanEvents) -> None:
        self._burst = burst
        self._events = events
        self._lent: dict[int, Loan] = {}
        self._closing: dict[int, Callable[[], bool]] = {}
        # Of those on whose connections others write as well: what of theirs waits.
        self._watched: dict[int, Callable[[], int]] = {}

    def __len__(self) -> int:
        return len(self._lent)

    def offer(
        self, sequence_id: int, state: StreamState, listener: LendingListener, detokenizer: ByteDetokenizer
    ) -> None:
        """Lend a stream, if its listener and its detokenizer can do without."""
        table: TokenTextTable | None = detokenizer.text_table()
        form = None if table is None else listener.form()
        if table is None or form is None:
            return
        if not self._burst.add(sequence_id, form, table, state.next_index, state.last_s):
            return
        self._lent[sequence_id] = loan = Loan(self, sequence_id, state, listener, detokenizer)
        self._closing[sequence_id] = form.is_closing
        if form.others_wait is not None:
            self._watched[sequence_id] = form.others_wait
        listener.lend(loan)

    def recall(self, sequence_id: int) -> None:
        """Have a stream come home, if it is lent."""
        loan = self._lent.pop(sequence_id, None)
        if loan is None:
            return
        del self._closing[sequence_id]
        self._watched.pop(sequence_id, None)
        written_bytes = self._burst.written_bytes(sequence_id)
        standing = self._burst.remove(sequence_id)
        loan.state.next_index, loan.state.last_s = standing.next_index, standing.last_s
        loan.listener.take_back(standing.number, loan.detokenizer.text_of(standing.said), written_bytes)

    def written_bytes(self, sequence_id: int) -> int:
        """See `Carrier`."""
        return self._burst.written_bytes(sequence_id) if sequence_id in self._lent else 0

    def step(self, outputs: wire.StepOutputs, now_s: float) -> list[int]:
        """Write the rows of lent streams; returns the indexes of all others. A lent stream among those has come home."""
        num_rows = len(outputs.token_ids) // 4
        closing, watched = self._closing, self._watched
        if len(closing) > 2 * num_rows:  # most of what is lent has no token in this step
            ids = wire.unpack_i64(outputs.sequence_ids)
            closing = {found: closing[found] for found in ids if found in closing}
            watched = {found: watched[found] for found in ids if found in watched} if watched else watched
        for sequence_id in [found for found, is_closing in closing.items() if is_closing()]:
            self.recall(sequence_id)
        for sequence_id in [found for found, others_wait in watched.items() if others_wait()]:
            self.recall(sequence_id)
        burst, at = self._burst, 0
        left: list[int] = []
        while at < num_rows:
            at, others, gaps = burst.step(
                outputs.sequence_ids, outputs.first_index, outputs.token_ids, at, now_s
            )
            left += others
            for gap_s, count in gaps:
                self._events.on_token_gap(gap_s, count)
            if rest := burst.rest():
                self._bring_home(wire.unpack_i64(outputs.sequence_ids)[at - 1], rest)
        if left and self._lent:
            sequence_ids = wire.unpack_i64(outputs.sequence_ids)
            for index in left:
                self.recall(sequence_ids[index])
        return left

    def _bring_home(self, sequence_id: int, rest: bytes) -> None:
        """A client did not take all of an event: its transport waits for it."""
        listener = self._lent[sequence_id].listener
        try:
            self.recall(sequence_id)
            listener.give(rest)
        except Exception as fault:
            self._events.on_fault(sequence_id, fault)
