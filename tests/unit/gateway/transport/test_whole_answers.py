"""Whole answers leave as ready-made bytes: the same head as aiohttp's own, whatever the client asked for and however it sent it."""

from __future__ import annotations

import json
import socket
import time
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}).encode()
JSON = {"Content-Type": "application/json"}


def told(connection: HTTPConnection, **more: str) -> tuple[dict[str, str], Any]:
    connection.request("POST", CHAT, BODY, {**JSON, **more})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    return {name.lower(): value for name, value in answer.getheaders()}, json.loads(answer.read())


def test_the_ready_head_says_what_the_usual_one_says(gateway: GatewayThread) -> None:
    connection = HTTPConnection(gateway.url.removeprefix("http://"), timeout=20)
    quick, quick_body = told(connection, **{"x-request-id": "mine"})
    usual, usual_body = told(connection, **{"x-request-id": "mine", "Origin": "https://a.example"})
    for head in (quick, usual):
        assert head.pop("date").endswith("GMT")
    assert quick == usual
    assert quick["x-request-id"] == "mine"
    assert "server" not in quick
    said = [body["choices"][0]["message"] for body in (quick_body, usual_body)]
    assert said[0] == said[1]
    assert said[0]["content"]


def test_each_answer_has_its_own_id(gateway: GatewayThread) -> None:
    connection = HTTPConnection(gateway.url.removeprefix("http://"), timeout=20)
    heads = [told(connection)[0] for _ in range(3)]
    assert len({head["x-request-id"] for head in heads}) == 3


def exchange(gateway: GatewayThread, *pieces: bytes, gap_s: float = 0.0) -> bytes:
    host, _, port = gateway.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(gap_s)
        client.shutdown(socket.SHUT_WR)
        said = b""
        while data := client.recv(65536):
            said += data
    return said


def request(version: bytes = b"1.1", more: bytes = b"") -> bytes:
    head = b"POST %b HTTP/%b\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n" % (
        CHAT.encode(),
        version,
    )
    return head + more + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.mark.parametrize(
    ("version", "more", "says_close"),
    [(b"1.1", b"", False), (b"1.1", b"Connection: close\r\n", True), (b"1.0", b"", False)],
)
def test_clients_that_leave_after_one_answer_get_it_whole(
    gateway: GatewayThread, version: bytes, more: bytes, says_close: bool
) -> None:
    head, _, body = exchange(gateway, request(version, more)).partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0]
    assert (b"connection: close" in head.lower()) == says_close
    assert json.loads(body)["choices"][0]["message"]["content"]


def test_pipelined_requests_and_bodies_in_pieces_are_answered_in_order(gateway: GatewayThread) -> None:
    ids = (b"first", b"second", b"third")
    wanted = [request(more=b"x-request-id: %b\r\n" % name) for name in ids]
    both, cut = wanted[0] + wanted[1], len(wanted[2]) - 9
    said = exchange(gateway, both, wanted[2][:cut], wanted[2][cut:], gap_s=0.05)
    assert said.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert sorted(ids, key=lambda name: said.find(b"x-request-id: " + name)) == list(ids)


def test_a_query_behind_the_path_changes_nothing(gateway: GatewayThread, worker: FakeWorker) -> None:
    connection = HTTPConnection(gateway.url.removeprefix("http://"), timeout=20)
    connection.request("POST", CHAT + "?a=1", BODY, JSON)
    answer = connection.getresponse()
    assert (answer.status, len(json.loads(answer.read())["choices"])) == (200, 1)
    assert gateway.gateway.service.metrics.http[CHAT, 200] == 1
