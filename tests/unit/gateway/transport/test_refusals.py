"""What a full gateway says, how little it looks at before saying so, and what stays of the connection."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from gateway.errors import error_headers
from gateway.generation import RequestError
from shared.errors import ErrorCode, FinishReason
from shared.protocol import Submit
from tests.fake_worker import LIMITS, Action, End, FakeWorker, Token, Wait
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened, ask
from tests.keys import KEY

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
POSTS = (CHAT, "/v1/completions", "/v1/responses", "/v1/query", "/v1/caption", "/v1/detect", "/v1/point")


@pytest.fixture
def full(worker: FakeWorker) -> Iterator[GatewayThread]:
    """A gateway whose rows and whose queue of one are taken."""
    worker.drain_rate = 0.25
    worker.script = lambda _: [Token(75), Wait(600)]
    settings = {"max_queue": 1, "api_keys": KEY, "cors_origins": "https://a.example"}
    with GatewayThread(workers=[worker.endpoint], **settings) as gateway:
        gateway.wait_ready()
        headers = {"Authorization": f"Bearer {KEY}"}
        held = [
            Opened(gateway.url, CHAT, {**HELLO, "stream": True}, headers=headers)
            for _ in range(LIMITS.max_rows + 1)
        ]
        occupancy = gateway.gateway.service.workers[0].occupancy
        gateway.wait_for(lambda: occupancy.drain_rate > 0 and occupancy.num_active == len(held))
        yield gateway
        for one in held:
            one.close()


def post(
    connection: HTTPConnection, path: str, body: bytes, **more: str
) -> tuple[int, dict[str, str], bytes]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **more}
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def test_bodies_are_not_looked_at_and_the_connection_stays(full: GatewayThread, worker: FakeWorker) -> None:
    connection = HTTPConnection(full.url.removeprefix("http://"), timeout=20)
    num_submits = len(worker.submits)
    first: socket.socket | None = None
    for path in POSTS:
        for body in (b"{ this is not JSON", b"x" * (1 << 20)):
            status, headers, data = post(connection, path, body)
            assert (status, json.loads(data)["error"]["code"]) == (429, "queue_full")
            assert headers["retry-after"] == "4" and headers["retry-after-ms"] == "4000"
            first = first or connection.sock
            assert connection.sock is first, "the connection was closed"
    connection.request("GET", "/healthz")
    assert connection.getresponse().read() and connection.sock is first
    assert len(worker.submits) == num_submits
    connection.close()


def test_a_refusal_waits_for_an_upload_in_progress_and_keeps_nothing_of_it(full: GatewayThread) -> None:
    """Most clients look at an answer only after sending everything; a closed connection would hide it from them."""
    host, port = full.url.removeprefix("http://").split(":")
    metrics = full.gateway.service.metrics
    before = metrics.refused["queue_full"]
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {3 << 20}\r\n\r\n".encode()
        )
        for _ in range(3):
            connection.sendall(b"x" * (1 << 20))
            full.wait_for(lambda: metrics.refused["queue_full"] == before + 1)
        assert connection.recv(65536).startswith(b"HTTP/1.1 429")
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_quick_no_says_what_the_long_one_says(full: GatewayThread) -> None:
    """With an `Origin` the usual response is made: but for CORS both carry the same headers and the same body."""
    connection = HTTPConnection(full.url.removeprefix("http://"), timeout=20)
    given = {"x-request-id": "one-of-mine"}
    quick = post(connection, CHAT, b"{}", **given)
    usual = post(connection, CHAT, b"{}", **given, Origin="https://a.example")
    assert usual[1].pop("access-control-allow-origin") == "https://a.example"
    usual[1].pop("access-control-expose-headers"), usual[1].pop("vary")
    usual[1].pop("date"), quick[1].pop("date")
    usual[1]["content-type"] = usual[1]["content-type"].removesuffix("; charset=utf-8")
    assert quick == usual and quick[1]["x-request-id"] == "one-of-mine"
    connection.close()


def test_refusals_are_counted_and_keys_come_first(full: GatewayThread) -> None:
    assert ask(full.url, CHAT, HELLO).status == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    metrics = full.gateway.service.metrics
    before = metrics.refused["queue_full"]
    assert ask(full.url, CHAT, HELLO, headers=headers).status == 429
    assert ask(full.url, CHAT, HELLO, headers={**headers, "Connection": "close"}).status == 429
    assert metrics.refused["queue_full"] == before + 2
    full.wait_for(lambda: metrics.http[CHAT, 429] >= 2)


def test_a_client_that_pipelines_gets_every_no_in_order(full: GatewayThread) -> None:
    host, port = full.url.removeprefix("http://").split(":")
    request = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 2\r\nx-request-id: n%d\r\n\r\n{}"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall("".join(request % number for number in range(5)).encode())
        got = b""
        while got.count(b"queue_full") < 5:
            piece = connection.recv(65536)
            assert piece
            got += piece
    ids = [got.index(b"x-request-id: n%d" % number) for number in range(5)]
    assert ids == sorted(ids) and got.count(b"HTTP/1.1 429 Too Many Requests\r\n") == 5


def test_out_of_memory_is_a_503_that_may_be_tried_again(worker: FakeWorker) -> None:
    error = RequestError(ErrorCode.OUT_OF_MEMORY, "no room for this one")
    assert error_headers(error)["Retry-After"] == "1"
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        worker.reject(ErrorCode.OUT_OF_MEMORY, message="no room for this one")
        answer = ask(gateway.url, CHAT, HELLO)
        assert (answer.status, answer.error["code"]) == (503, "out_of_memory")
        assert answer.headers["retry-after"] == "1" and answer.error["message"] == "no room for this one"
        worker.reply("ok")
        assert ask(gateway.url, CHAT, HELLO).status == 200


def broken_off(_: Submit) -> list[Action]:
    """A script: two tokens and an error."""
    return [Token(75), Token(76), End(FinishReason.ERROR, ErrorCode.NUMERICAL_ERROR, "NaN")]


def test_an_error_in_mid_stream_leaves_a_connection_that_serves_the_next_request(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        connection = HTTPConnection(gateway.url.removeprefix("http://"), timeout=20)
        first: socket.socket | None = None
        for path, body in (
            (CHAT, HELLO),
            ("/v1/responses", {"input": "hi"}),
            ("/v1/query", {"question": "hi"}),
        ):
            worker.script = broken_off
            status, headers, data = post(connection, path, json.dumps({**body, "stream": True}).encode())
            assert status == 200 and b"numerical_error" in data and "connection" not in headers
            worker.reply("fine")
            status, _, data = post(connection, path, json.dumps({**body, "stream": True}).encode())
            assert status == 200 and b"numerical_error" not in data
            first = first or connection.sock
            assert connection.sock is first, "the connection was closed"
        connection.close()
