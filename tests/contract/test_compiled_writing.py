"""Streams that the compiled loop writes are byte for byte those that Python writes, and end as they should however they end."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from gateway.native import library
from gateway.native.burst import Burst
from shared.errors import FinishReason
from tests.fake_worker import Action, End, FakeWorker, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import Opened
from tests.keys import ANY_KEY

TEXT = 'It said: "héllo" \\ and\n\tthen \u0007 🎈🎈, 東京 … /slash/ <b>&amp;</b> \u2028 end. ' * 4


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Skips where there is no compiler."""
    library.load()
    if library.loaded() is None:
        pytest.skip("no C compiler")


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences that the compiled loop took on."""
    taken: list[int] = []
    add = Burst.add

    def counted(self: Burst, sequence_id: int, *rest: Any) -> bool:
        is_here = add(self, sequence_id, *rest)
        if is_here:
            taken.append(sequence_id)
        return is_here

    monkeypatch.setattr(Burst, "add", counted)
    return taken


Serve = Callable[..., GatewayThread]


@pytest.fixture
def serve(worker: FakeWorker) -> Iterator[Serve]:
    """Gateways in front of a worker that says `TEXT`."""
    running: list[GatewayThread] = []
    worker.reply(TEXT)

    def served(**settings: Any) -> GatewayThread:
        running.append(GatewayThread(workers=[worker.endpoint], **settings))
        running[-1].__enter__()
        running[-1].wait_ready()
        return running[-1]

    yield served
    for gateway in running:
        gateway.__exit__(None, None, None)


def num_lent(gateway: GatewayThread) -> int:
    """Streams that are lent now."""
    workers = gateway.gateway.service._workers
    return gateway.call(lambda: sum(len(w.flights._loans or ()) for w in workers))


def raw(gateway: GatewayThread, path: str, body: dict[str, Any]) -> bytes:
    """An answer's bytes, with what differs from request to request blotted out."""
    parts = urlsplit(gateway.url)
    data = json.dumps(
        {"max_tokens" if "chat" in path or "comp" in path else "max_output_tokens": 2000, **body}
    ).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20) as connection:
        connection.sendall(head.encode() + data)
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    rest, body_bytes = received.partition(b"\r\n\r\n")[2], b""
    while rest:  # events of one moment may share a chunk
        size, _, rest = rest.partition(b"\r\n")
        body_bytes, rest = body_bytes + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    blotted = re.sub(
        rb'(resp_|msg_|chatcmpl-|cmpl-)[0-9a-f]+|"(created|created_at|completed_at)":\d+', b"?", body_bytes
    )
    return re.sub(rb'"(degas)":\{[^}]*\}', b"?", blotted)


CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "x"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/responses", {"input": "x", "stream": True}),
    ],
)
def test_the_bytes_are_those_that_python_writes(
    serve: Serve, lent: list[int], path: str, body: dict[str, Any]
) -> None:
    by_python = raw(serve(native=False), path, body)
    assert not lent
    gateway = serve()
    by_loop = raw(gateway, path, body)
    for _ in range(50):  # the first frames of a gateway find the loop, and make the vocabulary's texts
        if lent:
            break
        by_loop = raw(gateway, path, body)
    assert lent, by_loop
    assert by_loop == by_python


def test_official_clients_get_every_character(serve: Serve, lent: list[int]) -> None:
    gateway = serve()
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY, max_retries=0) as client:
        for _ in range(2):
            chat = client.chat.completions.create(
                model="fake-vl", max_tokens=2000, stream=True, messages=CHAT["messages"]
            )
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chat if chunk.choices)
            assert said.strip() == TEXT.strip()
            with client.responses.stream(model="fake-vl", input="x", max_output_tokens=2000) as stream:
                deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
                response = stream.get_final_response()
            assert "".join(deltas).strip() == TEXT.strip() == response.output_text.strip()
            assert response.usage is not None and response.usage.output_tokens == len(text_ids(TEXT))
        with client.responses.connect() as connection:
            connection.response.create(model="fake-vl", input="x", max_output_tokens=2000)
            events: list[Any] = []
            for event in connection:
                events.append(event)
                if event.type == "response.completed":
                    break
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(numbers)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta").strip() == TEXT.strip()
    assert events[-1].response.output_text.strip() == TEXT.strip()
    assert len(set(lent)) >= 4


def endless(_: object) -> list[Action]:
    """A token a tick for longer than any test."""
    return [action for _ in range(4000) for action in (Token(text_ids("a")[0]), Wait(0.001))]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until_s, what
        time.sleep(0.005)


def test_leaving_cancels_and_brings_the_stream_home(serve: Serve, worker: FakeWorker) -> None:
    gateway = serve()
    worker.script = endless
    opened = Opened(gateway.url, "/v1/chat/completions", CHAT | {"max_tokens": 1900})
    wait_until(lambda: num_lent(gateway) == 1, "the stream was not lent")
    opened.close()
    worker.wait_cancelled(1)
    wait_until(lambda: num_lent(gateway) == 0, "it was not given back")


def test_a_second_lane_brings_the_first_home(serve: Serve, worker: FakeWorker) -> None:
    gateway = serve()
    worker.script = endless
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ANY_KEY) as client,
        client.responses.connect() as connection,
    ):
        connection.response.create(stream_id="a", model="fake-vl", input="x")
        wait_until(lambda: num_lent(gateway) == 1, "the stream was not lent")
        connection.response.create(stream_id="b", model="fake-vl", input="x")
        wait_until(lambda: num_lent(gateway) == 0, "two streams of one connection leave together")
        connection.send({"type": "response.cancel", "stream_id": "a"})  # type: ignore[arg-type]
        wait_until(lambda: num_lent(gateway) == 1, "the other is alone again")
        connection.send({"type": "response.cancel", "stream_id": "b"})  # type: ignore[arg-type]
        numbers: dict[str, list[int]] = {"a": [], "b": []}
        ended = 0
        event: Any
        for event in connection:
            numbers[event.stream_id].append(event.sequence_number)
            ended += event.type == "response.incomplete"
            if ended == 2:
                break
    for found in numbers.values():
        assert found == list(range(len(found)))


def test_a_client_that_stops_reading_is_cut_off_and_others_go_on(serve: Serve, worker: FakeWorker) -> None:
    gateway = serve(slow_client_s=1.0, write_buffer_bytes=4096)
    token = Token(text_ids("a")[0])
    worker.script = lambda submit: [*[token] * submit.max_tokens, End(FinishReason.LENGTH)]
    parts = urlsplit(gateway.url)
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect((parts.hostname, parts.port))
        data = json.dumps(CHAT | {"max_tokens": 1900}).encode()
        stalled.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(data), data)
        )
        with Opened(gateway.url, "/v1/chat/completions", CHAT | {"max_tokens": 1900}) as other:
            said = [event for event in other.events() if isinstance(event, dict) and event["choices"]]
        assert said[-1]["choices"][0]["finish_reason"] == "length"


def test_a_worker_that_dies_ends_lent_streams(serve: Serve, worker: FakeWorker) -> None:
    gateway = serve()
    worker.script = endless
    said: list[Any] = []

    def read() -> None:
        with Opened(gateway.url, "/v1/chat/completions", CHAT | {"max_tokens": 1900}) as opened:
            said.extend(opened.events())

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: num_lent(gateway) == 1, "the stream was not lent")
    worker.die()
    reader.join(10)
    assert said[-1]["error"]["code"] == "worker_lost"
    assert num_lent(gateway) == 0


def test_a_duplicate_or_lost_token_is_still_seen(serve: Serve, worker: FakeWorker) -> None:
    """The loop hands a wrong index back, and the stream ends as any other does."""
    gateway = serve()
    worker.script = lambda _: [*[Token(text_ids("a")[0])] * 40, End(FinishReason.STOP)]
    with Opened(gateway.url, "/v1/chat/completions", CHAT) as opened:
        usage = next(
            event["usage"] for event in opened.events() if isinstance(event, dict) and event.get("usage")
        )
    assert usage["completion_tokens"] == 40
