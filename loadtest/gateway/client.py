"""Owns the clients of `degas bench gateway`: many connections and as little work for each as can be. Its own process, main thread.

`python -m degas.rooms loadtest.gateway.client KIND PORT COUNTERS STREAMS`. It says `ready` when every stream has its first token;
told `measure` on its stdin it begins to note when tokens arrive, told `stop` it prints what it noted as JSON, and ends.
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from loadtest.gateway.counters import Counters

ANSWER_TOKENS: Final = 8
_BODY: Final = {"model": "mock", "messages": [{"role": "user", "content": "Tell me of the sea."}]}
_LONG: Final = 1 << 24
_MARKS: Final = {"sse": b'"content":" ', "websocket": b'"delta":" '}
_SETUP_S: Final = 120.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def _post(body: dict[str, object]) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


def _handshake() -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    head = f"GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    return head.encode()


def _create() -> bytes:
    text = json.dumps(
        {
            "type": "response.create",
            "model": "mock",
            "input": "Tell me of the sea.",
            "max_output_tokens": _LONG,
        }
    ).encode()
    masked = bytes(byte ^ 0x55 for byte in text)
    return b"\x81\xfe" + len(text).to_bytes(2, "big") + b"\x55" * 4 + masked


class Clients:
    """All connections of one load."""

    def __init__(self, kind: str, port: int, counters: Counters, num_streams: int) -> None:
        self._kind = kind
        self._counters = counters
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._delays_ns: list[int] = []
        self._num_tokens = 0
        self._is_measuring = False
        self._request = _post({**_BODY, "max_tokens": ANSWER_TOKENS})
        for _ in range(num_streams):
            self._open(port)
        self._poll.register(sys.stdin.fileno(), select.EPOLLIN)

    def _open(self, port: int) -> None:
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._kind == "websocket":
            connection.sendall(_handshake())
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                answer += connection.recv(1)
            if b" 101 " not in answer:
                raise ConnectionError(answer.decode(errors="replace"))
            connection.sendall(_create())
        elif self._kind == "sse":
            connection.sendall(_post({**_BODY, "stream": True, "max_tokens": _LONG}))
        else:
            connection.sendall(self._request)
        connection.setblocking(False)
        self._sockets[connection.fileno()] = connection
        self._poll.register(connection.fileno(), select.EPOLLIN)

    def run(self) -> None:
        """Until told to stop. Raises ConnectionError when a server ends a stream."""
        if self._kind == "http":
            self._say({"ready": True})
            self._run(self._on_answer)
        else:
            waiting = set(self._sockets)
            mark = _MARKS[self._kind]
            deadline_s = time.monotonic() + _SETUP_S
            while waiting:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{len(waiting)} streams have no token after {_SETUP_S:g} s")
                for descriptor, _ in self._poll.poll(1.0):
                    if descriptor in self._sockets and mark in self._read(descriptor):
                        waiting.discard(descriptor)
            self._say({"ready": True})
            self._run(self._on_tokens)

    def _run(self, on_input: Callable[[int], None]) -> None:
        stdin = sys.stdin.fileno()
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != stdin:
                    on_input(descriptor)
                elif os.read(stdin, 100).startswith(b"measure"):
                    self._is_measuring = True
                else:
                    self._say(self._result())
                    return

    def _read(self, descriptor: int) -> bytes:
        data = self._sockets[descriptor].recv(1 << 16)
        if not data:
            raise ConnectionError("the server ended a stream")
        return data

    def _on_tokens(self, descriptor: int) -> None:
        data = self._read(descriptor)
        now_ns = time.monotonic_ns()
        mark = _MARKS[self._kind]
        if not self._is_measuring:
            return
        place = data.rfind(mark)
        if place >= 0:
            self._num_tokens += data.count(mark)
            start = place + len(mark)
            number = data[start : start + 4]
            if len(number) == 4:
                self._delays_ns.append(now_ns - self._counters.sent_ns(int(number)))

    def _on_answer(self, descriptor: int) -> None:
        data = self._read(descriptor)
        head, _, body = data.partition(b"\r\n\r\n")
        found = _LENGTH.search(head + b"\r\n")
        if b" 200 " not in head[:20] or found is None:
            raise ConnectionError(data[:500].decode(errors="replace"))
        missing = int(found[1]) - len(body)
        while missing > 0:
            select.select([descriptor], [], [], 10)
            missing -= len(self._read(descriptor))
        self._counters.on_answer()
        self._sockets[descriptor].sendall(self._request)

    def _result(self) -> dict[str, object]:
        delays = sorted(self._delays_ns)
        found = {"p50_ms": 0.5, "p99_ms": 0.99} if delays else {}
        told = {
            name: delays[min(len(delays) - 1, int(len(delays) * share))] / 1e6
            for name, share in found.items()
        }
        return {"num_tokens": self._num_tokens, "p50_ms": None, "p99_ms": None, **told}

    @staticmethod
    def _say(what: dict[str, object]) -> None:
        print(json.dumps(what), flush=True)


def main(arguments: list[str]) -> None:
    """Run one load."""
    kind, port, counters, num_streams = arguments
    Clients(kind, int(port), Counters(Path(counters)), int(num_streams)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
