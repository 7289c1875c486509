"""Before a request reaches the boundary: what the parser refuses, half-closed clients, 100-continue, odd headers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.transport.http import HOLDINGS
from tests.fake_worker import End, FakeWorker, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.keys import KEY
from tests.raw_socket import HANDSHAKE, Heard, RawSocket

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as worker:
        yield worker


@pytest.fixture(scope="module")
def gateway(worker: FakeWorker) -> Iterator[GatewayThread]:
    settings: dict[str, Any] = {"max_body_bytes": 64 << 10, "max_image_bytes": 32 << 10, "life_sign_s": 0.2}
    with GatewayThread(workers=[worker.endpoint], **settings) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture(scope="module")
def locked(worker: FakeWorker) -> Iterator[GatewayThread]:
    with GatewayThread(workers=[worker.endpoint], api_keys=KEY) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture(autouse=True)
def fresh_script(worker: FakeWorker) -> None:
    worker.reply("ok")
    worker.submits.clear()
    worker.cancelled.clear()


def post(path: str = CHAT, *lines: str, **fields: Any) -> bytes:
    """A whole request."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    return head("POST", path, f"Content-Length: {len(body)}", *lines) + body


def head(method: str, path: str, *lines: str) -> bytes:
    """A request's head."""
    given = ("Host: localhost", "Content-Type: application/json", *lines)
    return "\r\n".join([f"{method} {path} HTTP/1.1", *given, "", ""]).encode("latin-1")


def one_answer(gateway: GatewayThread, data: bytes) -> Heard:
    """The only answer to these bytes."""
    with RawSocket(gateway.url) as client:
        client.send(data)
        answer = client.answer()
    assert answer is not None
    return answer


# ---------------------------------------------------------------- refused by the parser

MALFORMED = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nBad Name: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: cat\r\n\r\n",
    b"GET /\x7f HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET " + b"/x" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n",
]


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_not_http_is_refused_in_the_error_shape(gateway: GatewayThread, data: bytes) -> None:
    answer = one_answer(gateway, data)
    assert answer.status in (400, 404, 431, 501) and answer.error["type"] == "invalid_request_error"
    assert "server" not in answer.headers and "aiohttp" not in repr(answer) and "ython" not in repr(answer)


def test_no_answer_names_its_server(gateway: GatewayThread) -> None:
    for request in (head("GET", "/healthz"), head("GET", "/"), head("GET", "/none"), post()):
        assert "server" not in one_answer(gateway, request).headers
    with RawSocket(gateway.url) as client:
        answer = client.upgrade()
        assert answer is not None and answer.status == 101 and "server" not in answer.headers


def test_all_of_a_header_is_bounded(gateway: GatewayThread) -> None:
    with RawSocket(gateway.url) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        for number in range(60):
            client.send(f"X-{number}: ".encode() + b"x" * 1000 + b"\r\n")
            time.sleep(0.0002)
        answer = client.answer()
        assert answer is None or answer.status == 431


# ---------------------------------------------------------------- headers

HEADERS = [
    "Content-Type",
    "Expect",
    "Upgrade",
    "Connection",
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Version",
    "Sec-WebSocket-Protocol",
    "Sec-WebSocket-Extensions",
    "Origin",
    "Accept",
    "Accept-Encoding",
    "Content-Encoding",
    "Cookie",
    "If-None-Match",
    "Range",
    "traceparent",
    "x-request-id",
]


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("value", ["\xe9", "a\xffb", "websocket\xe9"])
def test_a_byte_outside_ascii_is_a_400(gateway: GatewayThread, name: str, value: str) -> None:
    line = f"{name}: {value}"
    requests = [head("GET", "/healthz", line), head("GET", "/v1/responses", line)]
    lines = [one for one in HANDSHAKE.split("\r\n") if one and not one.startswith(name)]
    requests.append(("\r\n".join([*lines, line]) + "\r\n\r\n").encode("latin-1"))
    if name not in ("Content-Type",):
        requests.append(post(CHAT, line))
    for request in requests:
        answer = one_answer(gateway, request)
        assert answer.status == 400 and answer.error["code"] == "invalid_request", (request, answer)


def test_headers_that_nobody_reads_hold_what_they_like(gateway: GatewayThread) -> None:
    for name in ("X-Anything", "cf-ipcity"):
        assert one_answer(gateway, head("GET", "/healthz", f"{name}: Malm\xc3\xb6")).status == 200


# ---------------------------------------------------------------- half-closed clients


@pytest.mark.parametrize("parts", [1, 3])
def test_a_client_that_stops_sending_is_answered(
    gateway: GatewayThread, worker: FakeWorker, parts: int
) -> None:
    worker.script = lambda _: [Wait(0.2), *map(Token, text_ids("late")), End()]
    with RawSocket(gateway.url) as client:
        request = post()
        size = len(request) // parts + 1
        for start in range(0, len(request), size):
            client.send(request[start : start + size])
        client.half_close()
        answer = client.answer()
        assert answer is not None and answer.status == 200 and b"late" in answer.body
        assert client.rest() == b""


def test_pipelined_requests_before_a_half_close_are_all_answered(gateway: GatewayThread) -> None:
    with RawSocket(gateway.url) as client:
        client.send(head("GET", "/healthz") + post() + head("GET", "/healthz"))
        client.half_close()
        answers = [client.answer() for _ in range(3)]
        assert [answer.status for answer in answers if answer] == [200, 200, 200] and client.rest() == b""


def test_a_stream_goes_on_for_a_half_closed_client(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.script = lambda _: [Wait(0.1), *map(Token, text_ids("late")), End()]
    with RawSocket(gateway.url) as client:
        client.send(post(stream=True))
        client.half_close()
        said = client.rest()
    assert said.startswith(b"HTTP/1.1 200") and b"[DONE]" in said


def test_a_body_cut_short_by_a_half_close_is_a_400(gateway: GatewayThread) -> None:
    with RawSocket(gateway.url) as client:
        client.send(head("POST", CHAT, "Content-Length: 100") + b"{")
        client.half_close()
        answer = client.answer()
        assert answer is not None and answer.status == 400 and answer.error
        assert client.rest() == b""


@pytest.mark.slow
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("pause_s", [0.0, 1.1])
def test_a_client_that_leaves_is_found_out(
    gateway: GatewayThread, worker: FakeWorker, streams: bool, pause_s: float
) -> None:
    worker.script = lambda _: [Wait(60), End()]
    with RawSocket(gateway.url) as client:
        client.send(post(stream=streams))
        worker.wait_submits(1)
        time.sleep(pause_s)
    assert len(worker.wait_cancelled(1, timeout_s=5)) == 1


@pytest.mark.slow
def test_a_half_closed_client_that_waits_long_hears_interim_answers_only(
    gateway: GatewayThread, worker: FakeWorker
) -> None:
    worker.script = lambda _: [Wait(1.5), *map(Token, text_ids("late")), End()]
    with RawSocket(gateway.url) as client:
        client.send(post())
        client.half_close()
        heard = []
        while (answer := client.answer()) is not None:
            heard.append(answer)
    assert [answer.status for answer in heard] == [102, 102, 200] and b"late" in heard[-1].body


# ---------------------------------------------------------------- Expect: 100-continue

EXPECT = "Expect: 100-continue"


def test_a_body_that_will_be_read_is_invited(gateway: GatewayThread) -> None:
    head_of, _, body = post(CHAT, EXPECT).partition(b"\r\n\r\n")
    with RawSocket(gateway.url) as client:
        client.send(head_of + b"\r\n\r\n")
        first = client.answer()
        assert first is not None and first.status == 100
        client.send(body)
        answer = client.answer()
        assert answer is not None and answer.status == 200
        client.send(post())  # the connection goes on
        again = client.answer()
        assert again is not None and again.status == 200


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (head("POST", CHAT, EXPECT, "Content-Length: 99999999"), 413),
        (head("POST", CHAT, EXPECT, "Content-Length: 70000"), 413),
        (head("POST", "/nowhere", EXPECT, "Content-Length: 10"), 404),
        (head("PUT", CHAT, EXPECT, "Content-Length: 10"), 405),
        (head("POST", "/v1/responses", EXPECT, "Content-Length: 10", "Content-Encoding: gzip"), 400),
        (head("POST", CHAT, "Expect: a miracle", "Content-Length: 10"), 417),
        (
            b"POST /v1/query HTTP/1.1\r\nHost: evil.example\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
            400,
        ),
    ],
)
def test_a_body_that_will_be_refused_is_refused_without_an_invitation(
    gateway: GatewayThread, request_head: bytes, status: int
) -> None:
    with RawSocket(gateway.url) as client:
        client.send(request_head)
        answer = client.answer()
        assert answer is not None and answer.status == status and answer.error
        assert answer.headers["connection"] == "close" and client.rest() == b""


def test_without_a_key_nobody_is_invited(locked: GatewayThread) -> None:
    with RawSocket(locked.url) as client:
        client.send(head("POST", CHAT, EXPECT, "Content-Length: 10"))
        answer = client.answer()
        assert answer is not None and answer.status == 401 and client.rest() == b""


def test_a_full_server_refuses_without_an_invitation(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint]) as gateway, RawSocket(gateway.url) as client:
        gateway.call(gateway.gateway.service.begin_drain)
        client.send(head("POST", CHAT, EXPECT, "Content-Length: 10"))
        answer = client.answer()
        assert answer is not None and answer.status == 503 and client.rest() == b""


# ---------------------------------------------------------------- what is still arriving


def test_unfinished_bodies_of_one_key_are_bounded_together(worker: FakeWorker) -> None:
    settings = {"max_body_bytes": 1 << 20, "max_image_bytes": 1 << 19, "max_unfinished_bytes": 3 << 20}
    piece = b" " * 900_000
    with GatewayThread(workers=[worker.endpoint], **settings) as gateway:
        gateway.wait_ready()
        runner = gateway.gateway._runner
        assert runner is not None
        holdings = runner.app[HOLDINGS]
        clients = [RawSocket(gateway.url) for _ in range(4)]
        for number, client in enumerate(clients[:3]):
            client.send(head("POST", CHAT, "Content-Length: 1000000") + piece)
            gateway.wait_for(lambda n=number: holdings.of("") == (n + 1) * 900_000)  # type: ignore[misc]
        clients[3].send(head("POST", CHAT, "Content-Length: 1000000") + piece + b" " * 100_000)
        answers = [clients[3].answer()]
        for client in clients[:3]:
            client.send(b" " * 100_000)
            answers.append(client.answer())
        assert [answer.status for answer in answers if answer] == [429, 400, 400, 400]
        for client in clients:
            client.socket.close()
        assert holdings.of("") == 0 and one_answer(gateway, post()).status == 200
