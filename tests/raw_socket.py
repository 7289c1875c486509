"""A raw client for tests: bytes out as they are, answers in one by one; and WebSocket frames by hand."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

HANDSHAKE = (
    "GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


@dataclass
class Heard:
    """One answer's head and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> Any:
        """The inner error object; fails where the body is of another shape."""
        said = json.loads(self.body)
        assert set(said) == {"error"} and set(said["error"]) == {"message", "type", "param", "code"}
        assert said["error"]["message"] and self.headers["content-type"] == "application/json"
        return said["error"]


class RawSocket:
    """One connection."""

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=timeout_s)
        self._buffer = b""

    def send(self, data: bytes) -> None:
        """Send; a connection that the server has closed already takes it silently."""
        try:
            self.socket.sendall(data)
        except OSError:
            pass

    def half_close(self) -> None:
        """Say that nothing more will be sent, as `nc -N` does."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _more(self) -> bool:
        try:
            piece = self.socket.recv(65536)
        except ConnectionError:
            return False
        self._buffer += piece
        return bool(piece)

    def _take(self, size: int) -> bytes | None:
        while len(self._buffer) < size:
            if not self._more():
                return None
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def answer(self) -> Heard | None:
        """The next HTTP answer with a Content-Length, interim ones included; None at the end of the connection."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._more():
                assert not self._buffer, self._buffer
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split()[1])
        body = b"" if 100 <= status < 200 else self._take(int(headers.get("content-length", "0")))
        assert body is not None, "the body is cut short"
        return Heard(status, headers, body)

    def rest(self) -> bytes:
        """Everything until the server closes."""
        while self._more():
            pass
        rest, self._buffer = self._buffer, b""
        return rest

    def frame(self) -> tuple[int, bytes] | None:
        """The next WebSocket frame as (opcode, payload); None at the end of the connection."""
        head = self._take(2)
        if head is None:
            return None
        assert head[0] & 0x80 and not head[1] & 0x80, "the server sends whole, unmasked frames"
        size = head[1]
        if size >= 126:
            more = self._take(2 if size == 126 else 8)
            if more is None:
                return None
            size = int.from_bytes(more, "big")
        payload = self._take(size)
        return None if payload is None else (head[0] & 0x0F, payload)

    def close_code(self) -> int | None:
        """Read up to the close frame; its code, or None where the connection ended without one."""
        while (frame := self.frame()) is not None:
            if frame[0] == CLOSE:
                return int(struct.unpack("!H", frame[1][:2])[0]) if frame[1] else 1005
        return None

    def upgrade(self, *headers: str) -> Heard | None:
        """Send the handshake."""
        host, port = self.socket.getpeername()[:2]
        own = HANDSHAKE.replace("Host: 127.0.0.1", f"Host: {host}:{port}")
        self.send((own + "".join(f"{line}\r\n" for line in headers) + "\r\n").encode("latin-1"))
        return self.answer()

    def __enter__(self) -> RawSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    final: bool = True,
    masked: bool = True,
    bits: int = 0,
    announced: int | None = None,
) -> bytes:
    """One client's frame; `bits` are RSV1 to RSV3, `announced` a length that the payload need not have."""
    size = len(payload) if announced is None else announced
    head = bytes([(0x80 if final else 0) | bits << 4 | opcode])
    flag = 0x80 if masked else 0
    if size < 126:
        head += bytes([flag | size])
    elif size < 65536:
        head += bytes([flag | 126]) + struct.pack("!H", size)
    else:
        head += bytes([flag | 127]) + struct.pack("!Q", size)
    if not masked:
        return head + payload
    mask = b"\x01\x02\x03\x04"
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
