"""Journals against a model of them: whatever comes in whatever order, who follows sees every event once, and the bounds hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.decisions.journals import EVENT_OVERHEAD_BYTES, Journal, Journals
from gateway.generation import RequestError
from shared.errors import ErrorCode

STREAM_BYTES, TOTAL_BYTES, WINDOW_S = 600, 1000, 10.0
TENANTS = ("t", "t", "u")  # of the machine's streams


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
        self.num_opened = 3
        self.journals = Journals(WINDOW_S, STREAM_BYTES, TOTAL_BYTES)
        self.streams = [Stream() for _ in range(3)]
        self.held: list[Journal] = [
            self.journals.open(f"s{i}", TENANTS[i], stream, 0.0) for i, stream in enumerate(self.streams)
        ]
        self.written: list[list[bytes]] = [[], [], []]
        self.readers: list[Reader | None] = [None, None, None]

    @rule(index=st.integers(0, 2), size=st.integers(1, 200))
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

    @rule(index=st.integers(0, 2), place=st.integers(0, 1000))
    def come(self, index: int, place: int) -> None:
        journal = self.held[index]
        if journal.is_forgotten:
            with pytest.raises(RequestError):
                self.journals.find(TENANTS[index], journal.stream_id)
            return
        start = journal.first + place % (journal.next - journal.first + 1)
        journal.check(start - 1, "p")
        old, reader = self.readers[index], Reader(start)
        self.journals.attach(journal, reader, is_live=False)
        assert old is None or old.num_replaced == 1
        self.readers[index] = reader

    @rule(index=st.integers(0, 2), off=st.integers(1, 3))
    def come_for_what_is_not_there(self, index: int, off: int) -> None:
        journal = self.held[index]
        for after in (journal.next - 1 + off, journal.first - 1 - off):
            with pytest.raises(RequestError):
                journal.check(after, "p")

    @rule(index=st.integers(0, 2))
    def begin_another(self, index: int) -> None:
        if self.held[index].is_forgotten:
            self.num_opened += 1
            self.streams[index], self.written[index], self.readers[index] = Stream(), [], None
            name = f"s{self.num_opened}"
            self.held[index] = self.journals.open(name, TENANTS[index], self.streams[index], self.now_s)

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

    @rule(passed_s=st.floats(0, 6))
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
        for name in set(TENANTS):
            own = sum(journal.size_bytes for journal in held if journal.tenant == name)
            assert self.journals.size_of(name) == own
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


def test_room_is_made_from_ended_streams_that_nobody_follows() -> None:
    journals = Journals(WINDOW_S, STREAM_BYTES, TOTAL_BYTES)
    followed, left, own = (journals.open(name, "t", Stream(), 0.0) for name in ("followed", "left", "own"))
    for journal in (followed, left):
        journals.write(journal, b"x" * 300)
        journals.end(journal, 0.0)
    journals.attach(followed, Reader(0), is_live=False)
    for _ in range(3):
        journals.write(own, b"x" * 100)
    assert left.is_forgotten and not followed.is_forgotten and len(own.events) == 3
    for _ in range(3):
        journals.write(own, b"x" * 100)
    assert (
        len(own.events) == 3 and own.first == 3 and len(followed.events) == 1
    )  # it drops its own, not another's


def test_a_reader_that_is_outrun_is_told() -> None:
    journals = Journals(WINDOW_S, STREAM_BYTES, TOTAL_BYTES)
    journal = journals.open("s", "t", Stream(), 0.0)
    for _ in range(10):
        journals.write(journal, b"x" * 200)
    with pytest.raises(RequestError) as caught:
        journal.slice(3, 100)
    assert caught.value.code is ErrorCode.SLOW_CLIENT
    assert journal.slice(journal.first, 1) == [b"x" * 200] and journal.slice(journal.next, 1) == []


@given(
    st.lists(
        st.tuples(st.sampled_from("wwwwend"), st.integers(0, 5), st.integers(1, 250)),
        min_size=10,
        max_size=120,
    )
)
def test_a_tenant_below_an_equal_share_loses_nothing_to_the_others(
    events: list[tuple[str, int, int]],
) -> None:
    """Six streams of three tenants: who writes beyond its share makes the room itself, whoever else does not."""
    journals = Journals(WINDOW_S, STREAM_BYTES, TOTAL_BYTES)
    held = [journals.open(f"s{number}", str(number % 3), Stream(), 0.0) for number in range(6)]
    for kind, number, size in events:
        journal = held[number]
        if journal.ended:
            held[number] = journals.open(f"{journal.stream_id}+", journal.tenant, Stream(), 0.0)
        elif kind == "w":
            before = {name: journals.size_of(name) for name in "012"}
            num_tenants = sum(
                any(one.tenant == name and not one.is_forgotten for one in held) for name in "012"
            )
            journals.write(journal, b"x" * size)
            for name, had in before.items():
                if name != journal.tenant and had <= TOTAL_BYTES / num_tenants:
                    assert journals.size_of(name) == had
            assert journals.size_bytes <= TOTAL_BYTES
        else:
            journals.end(journal, 0.0)


def test_a_tenant_that_fills_everything_makes_room_for_one_that_comes() -> None:
    """Its ended streams go first, then the events of its largest; beyond its share the newcomer makes its own room."""
    journals = Journals(WINDOW_S, STREAM_BYTES, TOTAL_BYTES)
    done, first, second = (journals.open(name, "full", Stream(), 0.0) for name in ("done", "first", "second"))
    journals.write(done, b"x" * 236)
    journals.end(done, 0.0)
    for journal in (first, second, first):
        journals.write(journal, b"x" * 136)
    assert journals.size_of("full") == 900
    came = journals.open("came", "new", Stream(), 0.0)
    journals.write(came, b"x" * 136)
    assert done.is_forgotten and len(first.events) == 2
    journals.write(came, b"x" * 136)
    assert (journals.size_of("new"), journals.size_of("full")) == (400, 600)
    journals.write(came, b"x" * 36)
    assert (journals.size_of("new"), journals.size_of("full")) == (500, 400), (
        "it is the other that holds most"
    )
    journals.write(came, b"x" * 136)
    assert (journals.size_of("new"), journals.size_of("full")) == (500, 400), (
        "beyond a half it makes its own room"
    )
    assert came.first == 1 and second.first + first.first == 1
