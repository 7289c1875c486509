"""Who gets through the WebSocket's door, and what happens to those who misbehave behind it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.sync.connection import Connection

from tests.fake_worker import Action, End, FakeWorker, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.keys import KEY, WRONG_KEY

pytestmark = pytest.mark.slow

HELLO = json.dumps({"type": "response.create", "input": "hi"})


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as worker:
        yield worker


@pytest.fixture(scope="module")
def locked(worker: FakeWorker) -> Iterator[GatewayThread]:
    """A gateway with a key."""
    with GatewayThread(
        workers=[worker.endpoint], api_keys=KEY, cors_origins="https://app.example", max_body_bytes=23 << 20
    ) as gateway:
        gateway.wait_ready()
        yield gateway


def dial(gateway: GatewayThread, **options: Any) -> ClientConnection:
    """Open the WebSocket."""
    return connect(gateway.url.replace("http", "ws") + "/v1/responses", **options)


def until(connection: Connection, kind: str) -> dict[str, Any]:
    """Read up to an event of this type."""
    while True:
        event: dict[str, Any] = json.loads(connection.recv(timeout=10))
        if event["type"] == kind:
            return event


def page_origin(gateway: GatewayThread) -> dict[str, Any]:
    """As a browser on the gateway's own page."""
    return {"origin": gateway.url}


def test_a_key_in_the_header_opens(locked: GatewayThread) -> None:
    with dial(locked, additional_headers={"Authorization": f"Bearer {KEY}"}) as connection:
        connection.send(HELLO)
        until(connection, "response.completed")


def test_a_key_as_subprotocol_opens_and_is_not_echoed(locked: GatewayThread) -> None:
    names = ["realtime", f"openai-insecure-api-key.{KEY}"]
    with dial(locked, subprotocols=names, **page_origin(locked)) as connection:
        assert connection.subprotocol == "realtime"
        connection.send(HELLO)
        until(connection, "response.completed")


def test_a_key_as_first_message_opens(locked: GatewayThread) -> None:
    with dial(locked, **page_origin(locked)) as connection:
        connection.send(json.dumps({"type": "degas.authenticate", "api_key": KEY}))
        connection.send(HELLO)
        until(connection, "response.completed")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"additional_headers": {"Authorization": f"Bearer {WRONG_KEY}"}},
        {"additional_headers": {"Cookie": f"key={KEY}"}},
        {"subprotocols": ["realtime", f"openai-insecure-api-key.{WRONG_KEY}"]},
    ],
)
def test_without_the_key_the_handshake_is_refused(locked: GatewayThread, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidStatus) as caught:
        dial(locked, **options)
    assert caught.value.response.status_code == 401


@pytest.mark.parametrize(
    "first", [HELLO, json.dumps({"type": "degas.authenticate", "api_key": WRONG_KEY}), "[", "{}"]
)
def test_a_browser_without_the_key_gets_one_error_and_is_closed(locked: GatewayThread, first: str) -> None:
    with dial(locked, **page_origin(locked)) as connection:
        connection.send(first)
        event = json.loads(connection.recv(timeout=5))
        assert (
            event["type"] == "error" and event["status"] == 401 and event["error"]["code"] == "unauthorized"
        )
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(timeout=5)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 3000


def test_origins(locked: GatewayThread) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:1",
        "http://[",
        "https://app.example.evil.com",
    ):
        with pytest.raises(InvalidStatus) as caught:
            dial(locked, origin=origin, additional_headers=headers)
        assert caught.value.response.status_code == 403, origin
    for origin in ("https://app.example", locked.url):
        dial(locked, origin=origin, additional_headers=headers).close()


def test_binary_messages_are_refused_and_the_socket_stays(locked: GatewayThread) -> None:
    with dial(locked, additional_headers={"Authorization": f"Bearer {KEY}"}) as connection:
        connection.send(b"\x00\x01")
        assert json.loads(connection.recv(timeout=5))["type"] == "error"
        connection.send(HELLO)
        until(connection, "response.completed")


def test_a_message_over_the_limit_closes_with_1009(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], max_body_bytes=1 << 16, max_image_bytes=1 << 15) as gateway:
        gateway.wait_ready()
        with dial(gateway) as connection:
            connection.send(json.dumps({"type": "response.create", "input": "x" * (1 << 17)}))
            with pytest.raises(ConnectionClosed) as caught:
                connection.recv(timeout=5)
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009


def test_lanes_beyond_the_limit_wait_and_then_run(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        worker.submits.clear()
        worker.reply("ok")
        with dial(gateway) as connection:
            worker.hold()
            for number in range(40):
                connection.send(
                    json.dumps({"type": "response.create", "input": "x", "stream_id": f"l{number}"})
                )
            worker.wait_submits(16)
            worker.release()
            for _ in range(40):
                until(connection, "response.completed")
        assert len(worker.submits) == 40


def test_too_many_waiting_creates_are_refused_with_a_wait(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        worker.script = lambda _: [Wait(30), End()]
        try:
            with dial(gateway) as connection:
                for _ in range(66):
                    connection.send(
                        json.dumps({"type": "response.create", "input": "x", "stream_id": "same"})
                    )
                event = until(connection, "error")
                assert event["status"] == 429 and event["stream_id"] == "same"
                assert int(event["headers"]["retry-after"]) >= 1
        finally:
            worker.reply("ok")


def test_a_client_that_does_not_read_is_cut_off_and_others_go_on(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], write_buffer_bytes=8 << 10, slow_client_s=1.0) as gateway:
        gateway.wait_ready()
        worker.cancelled.clear()
        worker.submits.clear()
        # One token many times over: a hundred thousand of them would keep the worker busy for seconds.
        spoken: list[Action] = [Token(text_ids("y")[0])] * 100_000
        worker.script = lambda _: [*spoken, End()]
        raw = socket.create_connection(("127.0.0.1", gateway.gateway.port))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(
            b"GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert b"101" in raw.recv(200)
        try:
            for lane in range(8):  # enough output to fill the kernel's buffers too
                message = {
                    "type": "response.create",
                    "input": "x",
                    "stream_id": f"l{lane}",
                    "max_output_tokens": 1500,
                }
                raw.sendall(masked(json.dumps(message).encode()))
            # On a busy machine it may be cut off before all its lanes have begun.
            gateway.wait_for(lambda: gateway.gateway.service.metrics.num_slow_clients == 1, timeout_s=60)
            gateway.wait_for(lambda: gateway.gateway.service.num_in_flight == 0)
            assert worker.wait_cancelled(len(worker.submits)) and worker.submits
            worker.reply("ok")
            with dial(gateway) as connection:
                connection.send(HELLO)
                until(connection, "response.completed")
        finally:
            raw.close()
            worker.reply("ok")


def masked(payload: bytes) -> bytes:
    """A client's text frame, masked with zeroes."""
    assert 126 <= len(payload) < 65536 or len(payload) < 126
    head = (
        bytes([0x81, 0x80 | len(payload)])
        if len(payload) < 126
        else b"\x81\xfe" + len(payload).to_bytes(2, "big")
    )
    return head + b"\0\0\0\0" + payload


def test_a_stopping_gateway_says_so(worker: FakeWorker) -> None:
    gateway = GatewayThread(workers=[worker.endpoint])
    with gateway:
        gateway.wait_ready()
        worker.script = lambda _: [Wait(30), End()]
        connection = dial(gateway)
        connection.send(HELLO)
        until(connection, "response.in_progress")
        begun_s = time.monotonic()
    worker.reply("ok")
    failed = until(connection, "response.failed")
    assert failed["response"]["error"]["type"] == "shutting_down"
    with pytest.raises(ConnectionClosed) as caught:
        connection.recv(timeout=5)
    assert caught.value.rcvd is not None and caught.value.rcvd.code == 1012
    assert time.monotonic() - begun_s < 10
