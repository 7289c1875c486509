"""Owns the WebSocket connections and the lanes that requests share them by. One reader task a connection.

The reader stamps and counts every event itself; a request's own task sleeps until its terminal event, so
that a token costs one wake-up, not two.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import aiohttp
import msgspec

from loadtest.calls import LEFT, OK, Call
from loadtest.surfaces import PATHS, Fact, read_response_event

MAX_EVENT_BYTES: Final = 1 << 20
CLOSE_TIMEOUT_S: Final = 2.0


class Lanes:
    """A few WebSocket connections, each carrying many responses at once."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, *, num_connections: int) -> None:
        self._session = session
        self._url = "ws" + base_url.removeprefix("http") + PATHS["responses"]
        self._connections = [_Connection() for _ in range(num_connections)]

    async def stream(self, call: Call, lane: str, body: bytes, timeout_s: float) -> None:
        """Send one request on its lane and wait for its end; like `sse.stream`, it never raises but CancelledError.

        A client that leaves says so and does not wait for the server's answer to that.
        """
        connection = min(self._connections, key=lambda connection: len(connection.open))
        connection.open[lane] = entry = _Lane(call)
        try:
            async with asyncio.timeout(timeout_s):
                call.sent_s = time.perf_counter()
                socket = await connection.connect(self._session, self._url)
                if call.ended:
                    return  # the connection was lost before the request could be sent; the call has ended with it
                entry.sent = True
                await socket.send_str(body.decode())
                await entry.ended.wait()
            if call.code == LEFT:
                await connection.cancel(lane)
        except TimeoutError:
            call.on_end(time.perf_counter(), "timeout")
            await connection.cancel(lane)
        except aiohttp.WSServerHandshakeError as error:
            call.status = error.status
            call.on_end(time.perf_counter(), f"http_{error.status}", error.message)
        except aiohttp.ClientConnectorError as error:
            call.on_end(time.perf_counter(), "connection_refused", str(error))
        except (aiohttp.ClientError, ConnectionError, OSError):
            call.on_end(time.perf_counter(), "disconnected")
        finally:
            connection.open.pop(lane, None)
            call.on_end(time.perf_counter(), "unfinished")

    async def close(self) -> None:
        """Close every connection and end every reader."""
        await asyncio.gather(*(connection.close() for connection in self._connections))


class _Lane:
    """One request on a connection."""

    __slots__ = ("call", "ended", "sent")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.ended = asyncio.Event()
        self.sent = False

    def end(self, now_s: float, code: str = OK, message: str = "") -> None:
        self.call.on_end(now_s, code, message)
        self.ended.set()


class _Connection:
    """One WebSocket, opened at first use and again after it was lost."""

    def __init__(self) -> None:
        self.open: dict[str, _Lane] = {}
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._reader: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    async def connect(self, session: aiohttp.ClientSession, url: str) -> aiohttp.ClientWebSocketResponse:
        async with self._opening:
            if self._socket is None or self._socket.closed:
                await self._end_reader()
                self._socket = await session.ws_connect(url, max_msg_size=MAX_EVENT_BYTES, compress=0)
                self._reader = asyncio.create_task(self._read(self._socket), name="loadtest-lane-reader")
            return self._socket

    async def cancel(self, lane: str) -> None:
        """Tell the server to stop a response nobody waits for any more."""
        if self._socket is not None and not self._socket.closed:
            message = msgspec.json.encode({"type": "response.cancel", "stream_id": lane}).decode()
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._socket.send_str(message)
            except (TimeoutError, aiohttp.ClientError, ConnectionError):
                pass  # the reader notices the lost connection

    async def close(self) -> None:
        if self._socket is not None:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._socket.close()
            except TimeoutError:
                pass
        await self._end_reader()

    async def _end_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        try:
            async for message in socket:
                if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    self._on_message(message.data, time.perf_counter())
        finally:
            now_s = time.perf_counter()
            for lane in self.open.values():
                if lane.sent:  # the others are waiting for the next connection
                    lane.end(now_s, "disconnected")

    def _on_message(self, data: str | bytes, now_s: float) -> None:
        try:
            fact = read_response_event(data)
        except msgspec.DecodeError:
            fact = Fact(error="bad_event")
        if fact.lane is None:
            if (
                fact.error is not None
            ):  # an error of the connection itself: none of its responses may ever end
                for lane in self.open.values():
                    lane.end(now_s, fact.error, fact.message)
            return
        found = self.open.get(fact.lane)
        if found is None:
            return  # a late end of a request that was given up
        if fact.text:
            found.call.on_text(now_s, fact.text)
            if found.call.wants_to_leave:
                found.end(now_s, LEFT)
        if fact.tokens is not None:
            found.call.tokens = fact.tokens
        found.call.is_cut |= fact.is_cut
        if fact.error is not None:
            found.end(now_s, fact.error, fact.message)
        elif fact.done:
            found.end(now_s)
