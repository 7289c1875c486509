"""Owns whole answers in JSON as ready-made bytes, their head included. Gateway's loop.

A short answer is smaller than its head, and aiohttp's response needs longer to make that than the request took to check. What
changes between answers is their length, the request's id and what a key has left; the rest is built once a second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate

from aiohttp import HttpVersion11, web

from gateway.transport.refusal import ReadyAnswer


class WholeAnswer(ReadyAnswer):
    """A body in JSON. The boundary puts the head in front of it."""

    def __init__(self, body: bytes) -> None:
        super().__init__(200, body, keep_alive=True)


class Heads:
    """Puts heads in front of bodies; keeps what is the same for a second."""

    def __init__(self) -> None:
        self._second = 0
        self._before = b""  # up to the length

    def finish(
        self, answer: WholeAnswer, request: web.Request, request_id: str, more: Mapping[str, str] | None
    ) -> web.StreamResponse:
        """The answer, with the headers `more` where there are any. aiohttp's own response for a client that needs others
        than these (CORS, HTTP/1.0, close)."""
        if request.version != HttpVersion11 or not request.keep_alive or "Origin" in request.headers:
            return web.Response(body=answer.data, content_type="application/json")
        now_s = int(time.time())  # the Date header's
        if now_s != self._second:
            self._second = now_s
            self._before = (
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n"
                f"Date: {formatdate(now_s, usegmt=True)}\r\nContent-Length: "
            ).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in more.items()) if more else ""
        rest = f"{len(answer.data)}\r\nx-request-id: {request_id}\r\n{lines}\r\n".encode()
        answer.data = b"".join((self._before, rest, answer.data))
        return answer
