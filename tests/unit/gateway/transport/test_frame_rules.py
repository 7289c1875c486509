"""What RFC 6455 asks of a server about its clients' frames, and how much is held of them before and after the key."""

from __future__ import annotations

import json
import resource
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fake_worker import End, FakeWorker, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.raw_socket import BINARY, CLOSE, PING, PONG, TEXT, RawSocket, frame

KEY = "key-of-the-frame-tests"
LIMIT = 64 << 10
CONTINUATION = 0
CREATE = json.dumps({"type": "response.create", "input": "hi"}).encode()


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker(step_s=0.0005) as worker:
        worker.reply("ok")
        yield worker


@pytest.fixture(scope="module")
def gateway(worker: FakeWorker) -> Iterator[GatewayThread]:
    settings = {"max_body_bytes": LIMIT, "max_image_bytes": LIMIT // 2, "max_unfinished_bytes": 3 * LIMIT}
    with GatewayThread(workers=[worker.endpoint], life_sign_s=0.2, **settings) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture(scope="module")
def locked(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint], api_keys=KEY) as gateway:
        gateway.wait_ready()
        yield gateway


def opened(gateway: GatewayThread, *headers: str) -> RawSocket:
    """A connection that is upgraded."""
    client = RawSocket(gateway.url)
    answer = client.upgrade(*headers)
    assert answer is not None and answer.status == 101, answer
    return client


def event(client: RawSocket, kind: str) -> dict[str, object]:
    """Read up to an event of this type."""
    while (heard := client.frame()) is not None:
        if heard[0] == TEXT:
            said: dict[str, object] = json.loads(heard[1])
            if said["type"] == kind:
                return said
        assert heard[0] != CLOSE, heard
    raise AssertionError("the connection ended")


def code(number: int, reason: bytes = b"") -> bytes:
    """A close frame's payload."""
    return struct.pack("!H", number) + reason


FAULTS = {
    "unmasked": (frame(TEXT, CREATE, masked=False), 1002),
    "unmasked ping": (frame(PING, masked=False), 1002),
    "RSV1": (frame(TEXT, CREATE, bits=4), 1002),
    "RSV2": (frame(TEXT, CREATE, bits=2), 1002),
    "RSV3 on a ping": (frame(PING, bits=1), 1002),
    "opcode 3": (frame(3, b"x"), 1002),
    "opcode 11": (frame(11, b"x"), 1002),
    "long ping": (frame(PING, b"x" * 126), 1002),
    "fragmented ping": (frame(PING, b"x", final=False), 1002),
    "continuation of nothing": (frame(CONTINUATION, b"x"), 1002),
    "text within text": (frame(TEXT, b"{", final=False) + frame(TEXT, b"}"), 1002),
    "text within empty text": (frame(TEXT, b"", final=False) + frame(TEXT, b"{}"), 1002),
    "half a close code": (frame(CLOSE, b"\x03"), 1002),
    "invalid UTF-8": (frame(TEXT, b"\xff\xfe"), 1007),
    "UTF-8 cut by the end": (frame(TEXT, b"\xc3", final=False) + frame(CONTINUATION, b""), 1007),
    "invalid UTF-8 in a reason": (frame(CLOSE, code(1000, b"\xff")), 1007),
    "one byte over the limit": (frame(TEXT, announced=LIMIT + 1), 1009),
    "2**63 bytes": (frame(TEXT, announced=1 << 63), 1009),
    "over the limit by fragments": (
        frame(TEXT, b" " * LIMIT, final=False) + frame(CONTINUATION, b" "),
        1009,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("split", [False, True])
def test_a_broken_rule_closes_with_its_code(gateway: GatewayThread, fault: str, split: bool) -> None:
    data, expected = FAULTS[fault]
    with opened(gateway) as client:
        if split and len(data) < 1000:
            for place in range(len(data)):
                client.send(data[place : place + 1])
        else:
            client.send(data)
        assert client.close_code() == expected
        assert client.frame() is None


@pytest.mark.parametrize("number", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
def test_close_codes_that_nobody_may_send_are_answered_with_1002(gateway: GatewayThread, number: int) -> None:
    with opened(gateway) as client:
        client.send(frame(CLOSE, code(number)))
        assert client.close_code() == 1002


@pytest.mark.parametrize("number", [1000, 1001, 1003, 1007, 1008, 1009, 1011, 3000, 4999])
def test_other_close_codes_come_back(gateway: GatewayThread, number: int) -> None:
    with opened(gateway) as client:
        client.send(frame(CLOSE, code(number, b"bye")))
        assert client.close_code() == number
    with opened(gateway) as client:
        client.send(frame(CLOSE))
        assert client.close_code() == 1000


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_message_of_exactly_the_limit_is_taken(gateway: GatewayThread, pieces: int) -> None:
    message = CREATE.ljust(LIMIT)
    size = LIMIT // pieces + 1
    parts = [message[start : start + size] for start in range(0, LIMIT, size)]
    with opened(gateway) as client:
        for place, part in enumerate(parts):
            client.send(frame(CONTINUATION if place else TEXT, part, final=place == len(parts) - 1))
            client.send(frame(PING, b"between"))
        event(client, "response.completed")


@pytest.mark.parametrize("version", ["12", "14", "8", "0", "", "13, 8", "x"])
def test_another_version_is_a_426_that_names_ours(gateway: GatewayThread, version: str) -> None:
    from tests.raw_socket import HANDSHAKE

    with RawSocket(gateway.url) as client:
        client.send(HANDSHAKE.replace("Version: 13", f"Version: {version}").encode() + b"\r\n")
        answer = client.answer()
        assert answer is not None and answer.status == 426 and answer.headers["sec-websocket-version"] == "13"
        assert "websocket" in answer.headers["upgrade"] and answer.error


# ---------------------------------------------------------------- any frames at all

FRAMES = st.builds(
    lambda opcode, payload, final, masked, bits: frame(
        opcode, payload, final=final, masked=masked, bits=bits
    ),
    st.one_of(st.sampled_from([CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG]), st.integers(0, 15)),
    st.one_of(
        st.just(CREATE), st.binary(max_size=140), st.just(code(1000)), st.text(max_size=20).map(str.encode)
    ),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([True] * 9 + [False]),
    st.sampled_from([0] * 9 + [4, 2, 1]),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(FRAMES, max_size=6), junk=st.binary(max_size=20), cut=st.integers(1, 300))
def test_whatever_comes_one_close_answers_it(
    gateway: GatewayThread, capsys: pytest.CaptureFixture[str], frames: list[bytes], junk: bytes, cut: int
) -> None:
    data = b"".join(frames) + junk
    with opened(gateway) as client:
        for place in range(0, len(data), cut):
            client.send(data[place : place + cut])
        client.half_close()
        codes = []
        while (heard := client.frame()) is not None:
            if heard[0] == CLOSE:
                codes.append(struct.unpack("!H", heard[1][:2])[0])
            elif heard[0] == TEXT:
                json.loads(heard[1])
            assert not codes or heard[0] == CLOSE, "a frame behind the close"
        assert len(codes) <= 1 and set(codes) <= {1000, 1002, 1003, 1007, 1009, *range(3000, 5000)}
    with opened(gateway) as client:
        client.send(frame(TEXT, CREATE))
        event(client, "response.completed")
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err and "handler_failed" not in said.out


# ---------------------------------------------------------------- before and after the key


def peak_mib() -> float:
    """This process's memory, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow
def test_strangers_hold_a_few_kilobytes(locked: GatewayThread) -> None:
    before = peak_mib()
    clients = [opened(locked, f"Origin: {locked.url}") for _ in range(20)]
    piece = b"x" * (1 << 20)
    for client in clients:
        client.send(frame(TEXT, announced=23 << 20))
        for _ in range(4):
            client.send(piece)
    for client in clients:
        assert client.close_code() in (1009, None)
        client.socket.close()
    assert peak_mib() - before < 30


def test_strangers_may_send_one_small_message(locked: GatewayThread) -> None:
    origin = f"Origin: {locked.url}"
    with opened(locked, origin) as client:
        client.send(frame(TEXT, b"x" * 5000))
        assert client.close_code() == 1009
    with opened(locked, origin) as client:
        client.send(frame(PING) * 40)
        assert client.close_code() == 1008
    wrong = json.dumps({"type": "degas.authenticate", "api_key": "key-of-nobody-else"}).encode()
    with opened(locked, origin) as client:
        client.send(frame(TEXT, wrong) + frame(TEXT, CREATE.ljust(100_000)))
        assert event(client, "error")["status"] == 401
        assert client.close_code() == 3000


def test_what_is_sent_behind_the_key_waits_for_it(locked: GatewayThread) -> None:
    key = json.dumps({"type": "degas.authenticate", "api_key": KEY}).encode()
    message = frame(TEXT, CREATE.ljust(2 << 20))
    with opened(locked, f"Origin: {locked.url}") as client:
        client.send(frame(TEXT, key) + message)
        event(client, "response.completed")
        client.send(message)
        event(client, "response.completed")


def test_unfinished_messages_of_one_key_are_bounded_together(gateway: GatewayThread) -> None:
    clients = [opened(gateway) for _ in range(4)]
    for client in clients[:3]:
        client.send(frame(TEXT, b"x" * 1000, announced=LIMIT))
        client.send(b"x" * 1000)
    gateway.wait_for(lambda: holdings(gateway) == 3 * LIMIT)
    clients[3].send(frame(TEXT, b"x", announced=LIMIT))
    assert clients[3].close_code() == 1013
    clients[0].socket.close()
    gateway.wait_for(lambda: holdings(gateway) == 2 * LIMIT)
    with opened(gateway) as client:
        client.send(frame(TEXT, CREATE.ljust(LIMIT)))
        event(client, "response.completed")
    for client in clients:
        client.socket.close()
    gateway.wait_for(lambda: holdings(gateway) == 0)


def holdings(gateway: GatewayThread) -> int:
    """Unfinished bytes that the gateway counts."""
    from gateway.transport.http import HOLDINGS

    runner = gateway.gateway._runner
    assert runner is not None
    return runner.app[HOLDINGS].of("")


def test_a_waiting_socket_is_pinged(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.script = lambda _: [Wait(0.7), *map(Token, text_ids("late")), End()]
    try:
        with opened(gateway) as client:
            client.socket.settimeout(0.4)
            with pytest.raises(socket.timeout):
                client.frame()  # nobody waits for anything: no pings
            client.socket.settimeout(10)
            client.send(frame(TEXT, CREATE))
            kinds, begun_s = [], time.monotonic()
            while (heard := client.frame()) is not None and b"response.completed" not in heard[1]:
                kinds.append(heard[0])
            assert kinds.count(PING) >= 3 and time.monotonic() - begun_s > 0.6
    finally:
        worker.reply("ok")
