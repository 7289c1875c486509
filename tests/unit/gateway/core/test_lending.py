"""Which rows the compiled loop writes, and that a stream is its listener's again before anything else happens to it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gateway.core.lending import Loans
from gateway.core.tokens import ByteDetokenizer
from gateway.decisions.stream import StreamState
from gateway.generation import Carrier, Delta, End, Framing, SpatialObject, TextForm
from gateway.native import library
from gateway.native.burst import burst, text_table
from shared import protocol as wire

TOKENS = [b"a", b"b", b"\xf0\x9f", b"\x8e\x88", b"<end>"]
HALF, OTHER_HALF, SILENT = 2, 3, 4


class Lender:
    """A listener that lends its stream; all that reaches it is noted."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.is_closing = False
        self.waiting_bytes = 0
        self.carrier: Carrier | None = None
        self.taken: tuple[int, str, int] | None = None
        self.given = b""

    def form(self) -> TextForm | None:
        parts = (b'{"n":', b',"delta":', b"}")
        return TextForm(
            self.descriptor, Framing.TEXT_FRAME, parts, 4, True, lambda: self.is_closing, lambda: self.waiting_bytes
        )  # fmt: skip

    def lend(self, carrier: Carrier) -> None:
        self.carrier = carrier

    def take_back(self, number: int, text: str, written_bytes: int) -> None:
        self.carrier, self.taken = None, (number, text, written_bytes)

    def give(self, rest: bytes) -> None:
        self.given += rest

    def on_text(self, text: str) -> None: ...
    def on_delta(self, delta: Delta) -> None: ...
    def on_object(self, found: SpatialObject) -> None: ...
    def on_end(self, end: End) -> None: ...


class Events:
    """Notes gaps and faults."""

    def __init__(self) -> None:
        self.gaps: list[tuple[float, int]] = []
        self.faults: list[Exception] = []

    def on_token_gap(self, gap_s: float, count: int = 1) -> None:
        self.gaps.append((gap_s, count))

    def on_fault(self, sequence_id: int, fault: Exception) -> None:
        self.faults.append(fault)


class Scene:
    """One lent stream, its client, and frames for it."""

    def __init__(self) -> None:
        library.load()
        compiled = burst()
        if compiled is None:
            pytest.skip("no C compiler")
        self.ours, self.client = socket.socketpair()
        self.ours.setblocking(False)
        self.client.setblocking(False)
        self.lender, self.events = Lender(self.ours.fileno()), Events()
        self.loans = Loans(compiled, self.events)
        table = text_table(TOKENS, {SILENT})
        self.detokenizer = ByteDetokenizer(TOKENS, frozenset({SILENT}), {}, lambda: table)
        self.state = StreamState(self.detokenizer, started_s=0.0, num_prompt=3)
        self.state.next_index, self.state.last_s = 3, 1.0
        self.loans.offer(7, self.state, self.lender, self.detokenizer)

    def step(self, token_id: int, index: int) -> list[int]:
        """A frame with a row of this stream, and one of nobody here."""
        outputs = wire.StepOutputs(
            1, 1, wire.pack_i64([7, 8]), wire.pack_i32([index, 0]), wire.pack_i32([token_id, 0])
        )
        return self.loans.step(outputs, 2.0)

    def read(self) -> bytes:
        try:
            return self.client.recv(1 << 16)
        except BlockingIOError:
            return b""


@pytest.fixture
def scene() -> Iterator[Scene]:
    found = Scene()
    yield found
    found.ours.close()
    found.client.close()


def test_a_lent_stream_is_written_and_comes_home_as_it_stands(scene: Scene) -> None:
    assert scene.lender.carrier is not None and len(scene.loans) == 1
    assert scene.step(0, 3) == [1]
    assert scene.step(SILENT, 4) == [1]
    assert scene.step(1, 5) == [1]
    events = [b'\x81\x15{"n":5,"delta":"a"}', b'\x81\x15{"n":6,"delta":"b"}']
    assert scene.read() == b"".join(event[:1] + bytes([len(event) - 2]) + event[2:] for event in events)
    scene.lender.carrier.come_home()
    assert scene.lender.taken is not None and scene.lender.taken[:2] == (6, "ab")
    assert scene.lender.taken[2] == sum(map(len, events))
    assert (scene.state.next_index, scene.state.last_s) == (6, 2.0)
    assert scene.events.gaps == [(1.0, 1), (0.0, 1), (0.0, 1)]
    assert scene.step(0, 6) == [0, 1], "it is not here any more"
    scene.loans.recall(7)  # a second time is nothing


@pytest.mark.parametrize("num_others", [0, 9])  # the last: most of what is lent has no row in the frame
def test_nothing_is_written_once_a_connection_closes(scene: Scene, num_others: int) -> None:
    """Its descriptor's number may be another connection's by now."""
    for sequence_id in range(100, 100 + num_others):
        other = StreamState(scene.detokenizer, started_s=0.0, num_prompt=3)
        scene.loans.offer(sequence_id, other, Lender(scene.ours.fileno()), scene.detokenizer)
    assert len(scene.loans) == 1 + num_others
    scene.lender.is_closing = True
    assert scene.step(0, 3) == [0, 1]
    assert scene.read() == b"" and scene.lender.taken == (4, "", 0)


@pytest.mark.parametrize("num_others", [0, 9])
def test_what_others_wrote_leaves_first(scene: Scene, num_others: int) -> None:
    for sequence_id in range(100, 100 + num_others):
        other = StreamState(scene.detokenizer, started_s=0.0, num_prompt=3)
        scene.loans.offer(sequence_id, other, Lender(scene.ours.fileno()), scene.detokenizer)
    scene.lender.waiting_bytes = 10
    assert scene.step(0, 3) == [0, 1]
    assert scene.read() == b"" and scene.lender.taken == (4, "", 0)


@pytest.mark.parametrize(("token_id", "index"), [(HALF, 3), (0, 4), (0, 2), (99, 3)])
def test_what_the_loop_cannot_do_is_the_listeners_again(scene: Scene, token_id: int, index: int) -> None:
    assert scene.step(token_id, index) == [0, 1]
    assert scene.lender.taken == (4, "", 0) and scene.state.next_index == 3


def test_inside_a_character_nothing_is_lent(scene: Scene) -> None:
    scene.loans.recall(7)
    assert scene.detokenizer.step(HALF) == ""
    scene.loans.offer(7, scene.state, scene.lender, scene.detokenizer)
    assert len(scene.loans) == 0
    assert scene.detokenizer.step(OTHER_HALF) == "🎈"
    scene.loans.offer(7, scene.state, scene.lender, scene.detokenizer)
    assert len(scene.loans) == 1


def test_what_a_client_did_not_take_goes_to_its_listener(scene: Scene) -> None:
    index, received = 3, 0
    while scene.lender.taken is None:
        scene.step(0, index)
        index += 1
    while piece := scene.read():
        received += len(piece)
    number, text, written = scene.lender.taken
    assert received == written and number == 4 + len(text) and text == "a" * (index - 3)
    assert scene.lender.given and scene.state.next_index == index
    assert not scene.events.faults


def test_a_listener_that_raises_then_is_told_of(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(rest: bytes) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(scene.lender, "give", gone)
    scene.client.close()
    assert scene.step(0, 3) == [1]
    assert [type(fault) for fault in scene.events.faults] == [ConnectionResetError]
    assert len(scene.loans) == 0
