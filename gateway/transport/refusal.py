"""Owns the quick no: a 429 as ready-made bytes, because in a flood most answers are refusals. Gateway's loop.

All of a refusal but the request's id changes a few times a second at most, so it is built once and written past aiohttp's
own response, which costs more than the admission's decision. The connection stays open for the client's next try.
"""

from __future__ import annotations

import secrets
import time
from email.utils import formatdate
from http import HTTPStatus

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from gateway.errors import error_body, error_headers, http_status
from gateway.generation import RequestError


class ReadyAnswer(web.StreamResponse):
    """An answer that is bytes already, its head included."""

    def __init__(self, status: int, data: bytes, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self.data = data
        self._stays = keep_alive

    def force_close(self) -> None:
        """Close the connection after it; its head is not changed any more."""
        self._stays = False

    @property
    def keep_alive(self) -> bool:
        """Whether the connection serves another request. The head must agree."""
        return self._stays

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write all of it. Raises ConnectionError when the client is gone."""
        if not self.send(request):
            raise ConnectionResetError("the client left")
        return None

    def send(self, request: web.BaseRequest) -> bool:
        """Write all of it; False: the client is gone."""
        transport = request.transport
        if transport is None or transport.is_closing():
            return False
        transport.write(self.data)
        return True

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing: `prepare` has written everything."""


def ready_answer(error: RequestError, *, status: int | None = None) -> ReadyAnswer:
    """An error outside any request that the boundary saw: its parser refused it. The connection ends with it."""
    body = error_body(error)
    status = status or http_status(error)
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **error_headers(error),
        "X-Content-Type-Options": "nosniff",
        "x-request-id": secrets.token_hex(12),
        "Date": formatdate(usegmt=True),
        "Connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    return ReadyAnswer(status, f"{first}{head}\r\n".encode() + body, keep_alive=False)


class Refusals:
    """Makes refusals; keeps the last one until its text or its second changes."""

    def __init__(self) -> None:
        self._said: tuple[str, float, int] = ("", 0.0, 0)
        self._before = b""  # up to the value of x-request-id
        self._after = b""

    def answer(self, error: RequestError, request: web.Request, request_id: str) -> ReadyAnswer | None:
        """The refusal as bytes; None for a client that needs more headers than these (CORS, HTTP/1.0, close)."""
        if request.version != HttpVersion11 or not request.keep_alive or "Origin" in request.headers:
            return None
        if not request.content.is_eof():
            return None  # a body that nobody will read: the connection has to end
        # The Date header holds the wall clock's second, so the bytes are built anew when it changes.
        said = (error.message, error.retry_after_s, int(time.time()))
        if said != self._said:
            self._said = said
            self._build(error, said[2])
        data = self._before + request_id.encode() + self._after
        return ReadyAnswer(http_status(error), data, keep_alive=True)

    def _build(self, error: RequestError, now_s: int) -> None:
        body = error_body(error)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **error_headers(error),
            "X-Content-Type-Options": "nosniff",
            "Date": formatdate(now_s, usegmt=True),
        }
        lines = [f"HTTP/1.1 {http_status(error)} Too Many Requests"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._before = "\r\n".join([*lines, "x-request-id: "]).encode()
        self._after = b"\r\n\r\n" + body
