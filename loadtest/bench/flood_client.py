"""Owns the client of `degas bench flood`: raw HTTP/1.1 over connections that are kept alive. One asyncio task and callbacks.

The client shares the machine's cores with the server that it measures, so it reads only as much of an answer as it counts,
and records its own lateness.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import urlsplit

from loadtest.histogram import Histogram

WARM_UP_S: Final = 0.5
MAX_CONNECTIONS: Final = 1024
ASK_AGAIN_S: Final = (
    0.02  # after a refusal, of a client that keeps a number under way: it would else do little but be refused
)

_RETRY_AFTER_MS = re.compile(rb"\r\nretry-after-ms: (\d+)\r\n", re.IGNORECASE)
_RETRY_AFTER = re.compile(rb"\r\nretry-after: (\d+)\r\n", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass(slots=True)
class Phase:
    """What one stretch of load measured. Times count from when a request was due."""

    factor: float  # of the saturated rate; 0: the closed loop that finds it
    seconds: float = 0.0
    sent: int = 0
    finished: int = 0  # streams that ended well within the stretch
    refused: int = 0
    failed: int = 0
    without_retry_after: int = 0
    gateway_cpu_s: float = 0.0
    client_cpu_s: float = 0.0
    drain_rate: float = 0.0  # the worker's own figure when the stretch was over
    retry_after_s: list[float] = field(default_factory=list)
    ttft: Histogram = field(default_factory=Histogram)
    refusal: Histogram = field(default_factory=Histogram)
    lateness: Histogram = field(default_factory=Histogram)  # sent after due: the client's own

    @property
    def goodput(self) -> float:
        """Streams finished a second."""
        return self.finished / self.seconds if self.seconds else 0.0


class Flood:
    """One phase's client: a pool of connections, and what comes back on them."""

    def __init__(self, url: str, tokens: int, *, seed: int) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._tokens = tokens
        self._rng = random.Random(seed)
        self._idle: deque[Connection] = deque()
        self._connections: list[Connection] = []
        self._numbers = iter(range(1 << 40))
        self._start_s = 0.0
        self._end_s = 0.0
        self._phase = Phase(0.0)
        self._opening: set[asyncio.Task[None]] = set()

    async def saturate(self, in_flight: int, seconds: float) -> Phase:
        """Keep `in_flight` requests under way; returns what ended after the warm-up."""

        loop = asyncio.get_running_loop()

        def fire() -> None:
            if time.perf_counter() < self._end_s:
                self._fire(time.perf_counter(), again)

        def again(request: Request) -> None:
            self._count(request)
            if request.status == 429:
                loop.call_later(ASK_AGAIN_S, fire)
            else:
                fire()

        self._begin(0.0, seconds)
        for _ in range(in_flight):
            self._fire(time.perf_counter(), again)
        return await self._finish()

    async def arrive(self, factor: float, rate: float, seconds: float) -> Phase:
        """Send requests by Poisson arrivals at `rate` a second, whatever happens to earlier ones."""
        self._begin(factor, seconds)
        due_s = time.perf_counter()
        while due_s < self._end_s:
            delay_s = due_s - time.perf_counter()
            await asyncio.sleep(max(0.0, delay_s))
            self._fire(due_s, self._count)
            due_s += self._rng.expovariate(rate)
        return await self._finish()

    def _begin(self, factor: float, seconds: float) -> None:
        self._phase = Phase(factor, seconds)
        self._phase.client_cpu_s = -time.process_time()
        self._start_s = time.perf_counter() + WARM_UP_S
        self._end_s = self._start_s + seconds

    async def _finish(self) -> Phase:
        """Wait for the end and for what is outstanding, briefly."""
        await asyncio.sleep(max(0.0, self._end_s - time.perf_counter()))
        self._phase.client_cpu_s += time.process_time()
        deadline_s = time.perf_counter() + 10
        while len(self._idle) < len(self._connections) and time.perf_counter() < deadline_s:
            await asyncio.sleep(0.02)
        self._phase.failed += len(self._connections) - len(self._idle)
        for connection in self._connections:
            connection.close()
        await asyncio.gather(*self._opening)
        return self._phase

    def _fire(self, due_s: float, on_done: Callable[[Request], None]) -> None:
        number = next(self._numbers)
        body = (
            b'{"model":"sim","prompt":"flood %d","max_tokens":%d,"ignore_eos":true,"stream":true,"temperature":0}'
        ) % (number, self._tokens)
        data = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s"
        ) % (len(body), body)
        request = Request(due_s, data, on_done)
        if self._idle:
            self._idle.popleft().send(request)
        elif len(self._connections) < MAX_CONNECTIONS:
            task = asyncio.ensure_future(self._connect(request))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        else:
            self._phase.failed += 1

    async def _connect(self, request: Request) -> None:
        connection = Connection(self._idle.append, self._connections.remove)
        self._connections.append(connection)
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection, self._host, self._port)
        except OSError:
            self._connections.remove(connection)
            request.end(0)
            return
        connection.send(request)

    def _count(self, request: Request) -> None:
        """Count a request in the stretch it belongs to: an answer when it ends there, the rest when it was due there."""
        phase = self._phase
        if request.status == 200 and request.is_whole and self._start_s <= request.end_s < self._end_s:
            phase.finished += 1
        if not self._start_s <= request.due_s < self._end_s:
            return
        phase.sent += 1
        phase.lateness.record(request.sent_s - request.due_s)
        if request.status == 429:
            phase.refused += 1
            phase.refusal.record(request.end_s - request.due_s)
            if request.retry_after_s is None:
                phase.without_retry_after += 1
            else:
                phase.retry_after_s.append(request.retry_after_s)
        elif request.status == 200 and request.is_whole:
            phase.ttft.record(request.first_s - request.due_s)
        else:
            phase.failed += 1


class Request:
    """One request's bytes, times and outcome."""

    __slots__ = (
        "_on_done",
        "data",
        "due_s",
        "end_s",
        "first_s",
        "is_whole",
        "retry_after_s",
        "sent_s",
        "status",
    )

    def __init__(self, due_s: float, data: bytes, on_done: Callable[[Request], None]) -> None:
        self.due_s = due_s
        self.data = data
        self.sent_s = due_s
        self.first_s = 0.0
        self.end_s = 0.0
        self.status = 0
        self.is_whole = False
        self.retry_after_s: float | None = None
        self._on_done = on_done

    def end(self, status: int) -> None:
        """Note the request's end and status; 0 for a connection that broke."""
        self.status = status
        self.end_s = time.perf_counter()
        self._on_done(self)


class Connection(asyncio.Protocol):
    """One kept-alive connection, one request at a time; reads only as much of an answer as is counted."""

    def __init__(
        self, on_idle: Callable[[Connection], None], on_broken: Callable[[Connection], None]
    ) -> None:
        self._on_idle = on_idle
        self._on_broken = on_broken
        self._transport: asyncio.Transport | None = None
        self._request: Request | None = None
        self._head = b""
        self._left = -1  # bytes of a body of known length; -1: chunked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def send(self, request: Request) -> None:
        """Start a request on the idle connection."""
        assert self._transport is not None
        self._request, self._head = request, b""
        request.sent_s = time.perf_counter()
        self._transport.write(
            request.data
        )  # if the connection was closed meanwhile, `connection_lost` is called

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        request = self._request
        if request is None:
            return
        if not request.status:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            data, self._head = self._head[end + 4 :], self._head[: end + 2]
            self._on_head(request, self._head)
        if self._left < 0:
            if not request.first_s and b"data: {" in data:
                request.first_s = time.perf_counter()
            if b"data: [DONE]" in data:
                request.is_whole = True
            if not data.endswith(b"0\r\n\r\n"):
                return
        else:
            self._left -= len(data)
            if self._left > 0:
                return
        self._request = None
        self._on_idle(self)
        request.end(request.status)

    def _on_head(self, request: Request, head: bytes) -> None:
        request.status = int(head[9:12])
        length = _LENGTH.search(head)
        self._left = int(length[1]) if length is not None else -1
        exact, whole = _RETRY_AFTER_MS.search(head), _RETRY_AFTER.search(head)
        if whole is not None:
            request.retry_after_s = int(exact[1]) / 1e3 if exact is not None else float(whole[1])

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        request, self._request = self._request, None
        if request is not None:
            self._on_broken(self)
            request.end(0)
