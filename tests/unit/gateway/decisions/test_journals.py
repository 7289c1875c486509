"""Journals against a model of them: whatever comes in whatever order, who follows sees every event once, and the bounds hold."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.decisions.journals import EVENT_OVERHEAD_BYTES, Journal, Journals
from gateway.generation import RequestError

STREAM_BYTES, TOTAL_BYTES, WINDOW_S = 600, 1000, 10.0


class Stream:
    """What writes; counts how often it was cancelled."""

    num_cancels = 0

    def cancel(self) -> None:
        self.num_cancels += 1


class Reader:
    """A follower that notes what it sees."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.seen: list[bytes] = []
        self.num_over = self.num_replaced = 0

    def take(self, number: int, event: bytes) -> None:
        assert number == self.start + len(self.seen) and not self.num_over and not self.num_replaced
        self.seen.append(event)

    def over(self) -> None:
        self.num_over += 1

    def replaced(self) -> None:
        self.num_replaced += 1


class JournalMachine(RuleBasedStateMachine):
    """Three streams, and readers that come, catch up in steps, and leave."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.journals = Journals(WINDOW_S, STREAM_BYTES, TOTAL_BYTES)
        self.streams = [Stream() for _ in range(3)]
        self.held: list[Journal] = [
            self.journals.open(f"s{i}", "t", stream, 0.0) for i, stream in enumerate(self.streams)
        ]
        self.written: list[list[bytes]] = [[], [], []]
        self.readers: list[Reader | None] = [None, None, None]

    @rule(index=st.integers(0, 2), size=st.integers(1, 300))
    def write(self, index: int, size: int) -> None:
        journal = self.held[index]
        if not journal.ended:
            event = b"%d" % len(self.written[index]) + b"x" * size
            self.written[index].append(event)
            self.journals.write(journal, event)

    @rule(index=st.integers(0, 2))
    def end(self, index: int) -> None:
        if not self.held[index].ended:
            self.journals.end(self.held[index], self.now_s)

    @rule(index=st.integers(0, 2), back=st.integers(-2, 6))
    def come(self, index: int, back: int) -> None:
        journal = self.held[index]
        after = journal.next - 1 - back
        if journal.is_forgotten:
            with pytest.raises(RequestError):
                self.journals.find("t", journal.stream_id)
            return
        if after >= journal.next or after + 1 < journal.first:
            with pytest.raises(RequestError):
                journal.check(after, "p")
            return
        journal.check(after, "p")
        old, reader = self.readers[index], Reader(after + 1)
        self.journals.attach(journal, reader, is_live=False)
        assert old is None or old.num_replaced == 1
        self.readers[index] = reader

    @rule(index=st.integers(0, 2), most=st.integers(1, 500))
    def catch_up(self, index: int, most: int) -> None:
        journal, reader = self.held[index], self.readers[index]
        if reader is None or journal.is_live:
            return
        number = reader.start + len(reader.seen)
        if number < journal.first:
            with pytest.raises(RequestError):
                journal.slice(number, most)
            self.leave(index)
            return
        events = journal.slice(number, most)
        for offset, event in enumerate(events):
            reader.take(number + offset, event)
        if not events:
            self.journals.go_live(journal, reader)

    @rule(index=st.integers(0, 2))
    def leave(self, index: int) -> None:
        reader = self.readers[index]
        if reader is not None:
            self.journals.detach(self.held[index], reader, self.now_s)
            self.readers[index] = None

    @precondition(lambda self: self.now_s < 100)
    @rule(passed_s=st.floats(0, 8))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s
        for journal in self.journals.on_time(self.now_s):
            assert journal.follower is None and not journal.ended
            journal.stream.cancel()

    @invariant()
    def holds(self) -> None:
        held = [journal for journal in self.held if not journal.is_forgotten]
        size = sum(len(event) + EVENT_OVERHEAD_BYTES for journal in held for event in journal.events)
        assert self.journals.size_bytes == size <= TOTAL_BYTES and len(self.journals) == len(held)
        for index, journal in enumerate(self.held):
            assert journal.size_bytes <= STREAM_BYTES
            assert self.streams[index].num_cancels <= 1
            reader, written = self.readers[index], self.written[index]
            if not journal.is_forgotten:
                assert list(journal.events) == written[journal.first :]
            if reader is not None:
                assert reader.seen == written[reader.start : reader.start + len(reader.seen)]
                assert reader.num_over == (journal.ended and journal.is_live)
                if journal.is_live:
                    assert reader.start + len(reader.seen) == len(written)
                assert not journal.is_forgotten  # as long as somebody follows


TestJournals = JournalMachine.TestCase
TestJournals.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_foreign_tenant_is_told_what_a_stranger_is() -> None:
    journals = Journals(WINDOW_S, STREAM_BYTES, TOTAL_BYTES)
    journals.open("s", "mine", Stream(), 0.0)
    said = []
    for tenant, name in (("other", "s"), ("mine", "t")):
        with pytest.raises(RequestError) as caught:
            journals.find(tenant, name)
        said.append((caught.value.code, caught.value.message, caught.value.param))
    assert said[0] == said[1]
    assert journals.find("mine", "s").stream_id == "s"
