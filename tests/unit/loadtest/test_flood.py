"""The flood's client and its sums, without sockets; and once, briefly, the whole command's machinery."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from loadtest.bench.flood import measure, row_of
from loadtest.bench.flood_client import Connection, Phase, Request

STREAM = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b'10\r\ndata: {"a": "b"}\n\n\r\n',
    b"e\r\ndata: [DONE]\n\n\r\n",
    b"0\r\n\r\n",
)
REFUSAL = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\nRetry-After: 1\r\n"


class Wire:
    """As much of a transport as a connection uses."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.sent.append(data)


def opened() -> tuple[Connection, list[Connection], list[Connection]]:
    idle: list[Connection] = []
    broken: list[Connection] = []
    connection = Connection(idle.append, broken.append)
    connection.connection_made(cast(asyncio.BaseTransport, Wire()))
    return connection, idle, broken


@pytest.mark.parametrize(
    "pieces", [STREAM, (b"".join(STREAM),), (STREAM[0][:9], STREAM[0][9:], b"".join(STREAM[1:]))]
)
def test_a_stream_is_whole_when_its_last_chunk_is_here(pieces: tuple[bytes, ...]) -> None:
    connection, idle, _ = opened()
    done: list[Request] = []
    request = Request(0.0, b"x", done.append)
    connection.send(request)
    for piece in pieces:
        assert not done
        connection.data_received(piece)
    assert done == [request] and idle == [connection]
    assert request.status == 200 and request.is_whole and request.first_s > 0


@pytest.mark.parametrize(("more", "wait_s"), [(b"", 1.0), (b"retry-after-ms: 250\r\n", 0.25)])
def test_a_refusal_ends_with_its_body_and_says_when(more: bytes, wait_s: float) -> None:
    connection, idle, _ = opened()
    done: list[Request] = []
    connection.send(Request(0.0, b"x", done.append))
    head = REFUSAL + more + b"\r\n"
    connection.data_received(head[:20])
    connection.data_received(head[20:] + b"bo")
    assert not done
    connection.data_received(b"dy")
    assert idle and (done[0].status, done[0].retry_after_s, done[0].is_whole) == (429, wait_s, False)


def test_a_connection_that_breaks_is_no_answer_and_is_not_used_again() -> None:
    connection, idle, broken = opened()
    done: list[Request] = []
    connection.send(Request(0.0, b"x", done.append))
    connection.data_received(STREAM[0])
    connection.connection_lost(None)
    assert done[0].status == 0 and broken == [connection] and not idle


def phase(factor: float, finished: int, ttft_s: float, refusal_s: float, retry_after_s: float) -> Phase:
    made = Phase(factor, seconds=1.0, sent=1000, finished=finished, refused=900, drain_rate=5.0)
    made.ttft.record(ttft_s)
    made.refusal.record(refusal_s)
    made.retry_after_s.append(retry_after_s)
    return made


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (phase(10.0, 86, 0.14, 0.019, 0.2), True),
        (phase(10.0, 84, 0.14, 0.019, 0.2), False),  # too little goodput
        (phase(10.0, 86, 0.16, 0.019, 0.2), False),  # the admitted wait too long
        (phase(10.0, 86, 0.14, 0.021, 0.2), False),  # the refused wait too long
        (phase(10.0, 86, 0.14, 0.019, 1.0), False),  # the fallback is no measured time
        (phase(10.0, 86, 0.14, 0.019, 0.6), False),  # nor is one the rate does not give
        (phase(1.0, 10, 9.0, 9.0, 1.0), None),  # nothing is promised there
    ],
)
def test_each_promise_can_be_missed(given: Phase, kept: bool | None) -> None:
    saturated = phase(0.0, 100, 0.1, 0.001, 0.2)
    row = row_of([given], [saturated])
    assert row.keeps_promise is kept
    assert row.goodput_ratio == pytest.approx(given.finished / 100)


@pytest.mark.slow
def test_a_short_flood_of_a_real_gateway_is_all_answers_and_proper_refusals() -> None:
    saturated, flooded = measure(
        profile="small", rows=2, queue=2, tokens=16, seconds=0.3, rounds=1, factors=(3.0,)
    )
    assert saturated.goodput_per_s > 0 and saturated.failed == flooded.failed == 0
    assert flooded.refused > 0 and flooded.all_say_retry_after
