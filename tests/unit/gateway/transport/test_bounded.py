"""Writing past a transport: order, what leaves together, and what happens when the kernel takes no more."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from gateway.transport import bounded as module
from gateway.transport.bounded import BoundedWriter
from gateway.transport.frames import FrameWriter

Body = Callable[[asyncio.Transport, socket.socket], Awaitable[None]]


def run(body: Body, *, uv: bool = True) -> None:
    """Run `body` with a transport and the socket that its client reads."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        try:
            await body(transport, theirs)
        finally:
            transport.abort()
            theirs.close()

    (uvloop.run if uv else asyncio.run)(main())


def writer(
    transport: asyncio.Transport, stalled: list[str] | None = None, limit: int = 1 << 20
) -> BoundedWriter:
    told = stalled if stalled is not None else []
    return BoundedWriter(transport, lambda: told.append("stalled"), limit_bytes=limit, stall_s=10)


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    sent: list[bytes] = []
    send = module._send

    def counted(descriptor: int, data: bytes) -> int:
        sent.append(data)
        return send(descriptor, data)

    monkeypatch.setattr(module, "_send", counted)
    return sent


@pytest.mark.parametrize("uv", [True, False])
def test_bytes_arrive_in_order_however_they_leave(uv: bool) -> None:
    async def body(transport: asyncio.Transport, client: socket.socket) -> None:
        out = writer(transport)
        expected = b""
        received = b""
        for number in range(2000):  # far more than the socket holds: most of it goes through the transport
            data = b"%d " % number * 200
            expected += data
            (out.write_soon if number % 7 == 3 else out.write)(data)
            if number % 50 == 49:
                await asyncio.sleep(0)
                received += client.recv(1 << 18)
        async with asyncio.timeout(10):
            while len(received) < len(expected):
                try:
                    received += client.recv(1 << 20)
                except BlockingIOError:
                    await asyncio.sleep(0.001)
        assert received == expected
        assert out.written_bytes == len(expected)

    run(lambda t, c: body(t, c), uv=uv)


def test_what_several_streams_say_in_one_turn_leaves_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = count_writes(monkeypatch)

    async def body(transport: asyncio.Transport, client: socket.socket) -> None:
        out = FrameWriter(transport, lambda: None, limit_bytes=1 << 20, stall_s=10)
        out.write(b"alone")
        assert len(sent) == 1
        out.is_shared = True
        out.write(b"one")
        out.write(b"two")
        assert len(sent) == 1
        await asyncio.sleep(0)
        assert sent[1:] == [b"\x81\x03one\x81\x03two"]
        out.write(b"last words")
        out.close()
        assert sent[2:] == [b"\x81\x0alast words"]

    run(body)


def test_nothing_is_written_to_a_transport_that_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = count_writes(monkeypatch)

    async def body(transport: asyncio.Transport, client: socket.socket) -> None:
        out = writer(transport)
        out.write_soon(b"held")
        transport.abort()  # its descriptor may soon be somebody else's
        out.write(b"late")
        await asyncio.sleep(0)
        assert not sent

    run(body)


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    stalled: list[str] = []

    async def body(transport: asyncio.Transport, client: socket.socket) -> None:
        out = writer(transport, stalled, limit=1 << 16)
        for _ in range(100):
            out.write(bytes(1 << 16))
            out.write_soon(b"x")
        assert stalled == ["stalled"] and transport.is_closing()

    run(body)
