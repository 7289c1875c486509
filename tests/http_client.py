"""A small HTTP client for tests: raw sockets and events, nothing retried, nothing hidden."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    """One whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The inner error object."""
        return self.json["error"]


def ask(
    url: str,
    path: str,
    body: object = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = 20.0,
) -> Answer:
    """Send one request, `body` as JSON unless it is bytes."""
    with Opened(url, path, body, method=method, headers=headers, timeout_s=timeout_s) as opened:
        response = opened.response
        names = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, names, response.read())


class Opened:
    """A request whose answer is read bit by bit."""

    def __init__(
        self,
        url: str,
        path: str,
        body: object = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 20.0,
    ) -> None:
        parts = urlsplit(url)
        self.connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        self.connection.request(method or ("GET" if data is None else "POST"), path, data, given)
        self.response: HTTPResponse = self.connection.getresponse()

    def events(self) -> Iterator[Any]:
        """Server-sent events as they come: decoded JSON, or the text where it is none (`[DONE]`)."""
        for line in self.response:
            if line.startswith(b"data: "):
                data = line[6:].strip()
                yield json.loads(data) if data.startswith(b"{") else data.decode()

    def close(self) -> None:
        """Leave without another word."""
        self.response.close()
        self.connection.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def raw(url: str, data: bytes, *, timeout_s: float = 20.0) -> bytes:
    """Send bytes as they are; everything the server answers until it closes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout_s) as connection:
        connection.sendall(data)
        pieces = []
        while piece := connection.recv(65536):
            pieces.append(piece)
        return b"".join(pieces)
