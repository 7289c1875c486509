"""The compiled loop against the same thing in Python: texts in JSON, frames, streams that come and go, clients that stall."""

from __future__ import annotations

import random
import socket
from array import array
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.generation import Framing, TextForm
from gateway.native import library
from gateway.native.burst import Burst, TokenTextTable, burst, text_table
from gateway.transport.frames import text_frame


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """Skips where there is no compiler."""
    library.load()
    if library.loaded() is None:
        pytest.skip("no C compiler")


def table_of(*tokens: bytes, silent: tuple[int, ...] = ()) -> TokenTextTable:
    table = text_table(tokens, silent)
    assert table is not None
    return table


def loop() -> Burst:
    found = burst()
    assert found is not None
    return found


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end and the client's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def form(
    ours: socket.socket, *, framing: Framing = Framing.CHUNK, number: int | None = None, keeps: bool = False
) -> TextForm:
    middle = b"" if number is None else b',"delta":'
    return TextForm(ours.fileno(), framing, (b'data: {"n":', middle, b"}\n\n"), number, keeps, lambda: False)


def step(
    loop: Burst, rows: list[tuple[int, int, int]], begin: int = 0, now_s: float = 2.0
) -> tuple[int, list[int], list[tuple[float, int]]]:
    """Rows of (sequence id, index, token)."""
    ids, first, tokens = zip(*rows, strict=True)
    end, left, gaps = loop.step(
        array("q", ids).tobytes(), array("i", first).tobytes(), array("i", tokens).tobytes(), begin, now_s
    )
    return end, list(left), list(gaps)


@given(st.lists(st.one_of(st.text(max_size=40).map(str.encode), st.binary(max_size=9)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_tokens_text_is_what_the_encoder_writes(tokens: list[bytes]) -> None:
    table = table_of(*tokens)
    for token_id, data in enumerate(tokens):
        try:
            expected = msgspec.json.encode(data.decode()) if data else b""
        except UnicodeDecodeError:
            expected = None
        assert table.json(token_id) == expected
    assert table.json(len(tokens)) is None
    assert table.json(-1) is None


def test_every_character_up_to_two_bytes_and_the_ends_of_the_others() -> None:
    some = [*range(0x900), *range(0xD7F0, 0xD800), *range(0xE000, 0xE010), 0xFFFF, 0x10000, 0x10FFFF]
    tokens = [chr(code).encode() for code in some]
    table = table_of(*tokens)
    assert [table.json(i) for i in range(len(some))] == [msgspec.json.encode(chr(code)) for code in some]


@pytest.mark.parametrize(
    "data",
    [b"\x80", b"\xc3", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"ab\xe2\x82"],
)  # fmt: skip
def test_bytes_that_are_no_characters_are_left_to_others(data: bytes) -> None:
    assert table_of(data).json(0) is None


def test_a_silent_token_and_a_very_long_one() -> None:
    table = table_of(b"<|end|>", b"x" * 5000, b"x" * 600, silent=(0,))
    assert (table.json(0), table.json(1)) == (b"", None)
    assert table.json(2) == b'"' + b"x" * 600 + b'"'


@pytest.mark.parametrize("size", [1, 8, 100, 200, 255, 256, 600])
def test_an_event_is_framed_as_its_connection_wants(
    pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    ours, theirs = pair
    text = b"y" * size
    table, burst = table_of(text), loop()
    assert burst.add(1, form(ours), table, 5, 1.0)
    assert step(burst, [(1, 5, 0)]) == (1, [], [(1.0, 1)])
    event = b'data: {"n":"' + text + b'"}\n\n'
    assert theirs.recv(1 << 16) == b"%x\r\n%b\r\n" % (len(event), event)
    burst.remove(1)
    assert burst.add(1, form(ours, framing=Framing.TEXT_FRAME, number=98), table, 6, 1.0)
    step(burst, [(1, 6, 0)])
    step(burst, [(1, 7, 0)])
    events = [b'data: {"n":%d,"delta":"%b"}\n\n' % (number, text) for number in (99, 100)]
    assert theirs.recv(1 << 16) == b"".join(map(text_frame, events))
    assert burst.remove(1).number == 100


def test_what_is_not_for_the_loop_is_handed_back_untouched(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    burst = loop()
    table = table_of(b"a", b"\xe2\x82", b"<end>", silent=(2,))
    for sequence_id in (1, 2, 3, 4, 5):
        assert burst.add(sequence_id, form(ours, keeps=True), table, 3, 1.0)
    rows = [
        (9, 3, 0),  # of nobody here
        (1, 3, 0),
        (2, 4, 0),  # a gap
        (3, 3, 1),  # half a character
        (4, 3, 2),  # not shown, and counted
        (5, 3, 77),  # outside the vocabulary
    ]
    assert step(burst, rows) == (6, [0, 2, 3, 5], [(1.0, 2)])
    assert theirs.recv(1 << 16).count(b"data:") == 1
    standings = {sequence_id: burst.remove(sequence_id) for sequence_id in (1, 2, 3, 4, 5)}
    assert [standings[i].next_index for i in (1, 2, 3, 4, 5)] == [4, 3, 3, 4, 3]
    assert [list(standings[i].said) for i in (1, 2, 3, 4, 5)] == [[0], [], [], [], []]
    assert standings[1].last_s == 2.0 and standings[2].last_s == 1.0


def test_a_client_that_takes_only_a_part_ends_the_call(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    other, reads = socket.socketpair()
    burst = loop()
    table = table_of(b"z" * 500)
    assert burst.add(1, form(ours), table, 0, 1.0)
    assert burst.add(2, form(other), table, 0, 1.0)
    index, rest = 0, b""
    while not rest:
        end, left, _ = step(burst, [(1, index, 0), (2, index, 0)])
        assert not left
        rest, index = burst.rest(), index + 1
        if not rest:
            reads.recv(1 << 16)
    assert end == 1, "the second row is still to come"
    received = b""
    while len(received) < burst.written_bytes(1):
        received += theirs.recv(1 << 20)
    whole = received + rest
    assert whole.count(b"data:") == index and whole.endswith(b"\r\n")
    assert burst.remove(1).next_index == index
    assert step(burst, [(1, index, 0), (2, index - 1, 0)], begin=end) == (2, [], [(0.0, 1)])
    assert burst.rest() == b""
    other.close()
    reads.close()


def test_a_client_that_left_ends_the_call_too(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    burst = loop()
    assert burst.add(1, form(ours), table_of(b"a"), 0, 1.0)
    theirs.close()
    end, _, _ = step(burst, [(1, 0, 0)])
    assert (end, burst.rest()) == (1, b'11\r\ndata: {"n":"a"}\n\n\r\n')


def test_times_since_the_tokens_before_are_told_together(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    burst = loop()
    table = table_of(b"a")
    for sequence_id, last_s in enumerate((1.0, 1.0, 1.5, 1.0)):
        burst.add(sequence_id, form(ours), table, 0, last_s)
    assert step(burst, [(i, 0, 0) for i in range(4)])[2] == [(1.0, 2), (0.5, 1), (1.0, 1)]


def test_a_form_that_is_too_long_is_not_taken(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    long = TextForm(ours.fileno(), Framing.CHUNK, (b"x" * 16000, b"", b""), None, False, lambda: False)
    burst = loop()
    assert not burst.add(1, long, table_of(b"a"), 0, 1.0)
    assert len(burst) == 0


@pytest.mark.parametrize("seed", range(8))
def test_streams_that_come_and_go_are_always_found(
    pair: tuple[socket.socket, socket.socket], seed: int
) -> None:
    """The table of streams beside a dict, with ids that fall onto each other's places."""
    ours, theirs = pair
    rng = random.Random(seed)
    burst = loop()
    table = table_of(b"a")
    here: dict[int, int] = {}
    start = rng.randrange(1 << 40)
    for _ in range(600):
        sequence_id = start + rng.randrange(300) * rng.choice((1, 1, 1 << 20, 1 << 33))
        if sequence_id in here and rng.random() < 0.6:
            assert burst.remove(sequence_id).next_index == here.pop(sequence_id)
        elif sequence_id not in here:
            assert burst.add(sequence_id, form(ours), table, 0, 1.0)
            here[sequence_id] = 0
        some = rng.sample(sorted(here), min(len(here), 5))
        if some:
            assert step(burst, [(i, here[i], 0) for i in some])[:2] == (len(some), [])
            for i in some:
                here[i] += 1
            theirs.recv(1 << 16)
    assert len(burst) == len(here)
    for sequence_id, index in here.items():
        assert burst.remove(sequence_id).next_index == index
