"""Owns faults of clients: they leave at any point, or stop reading. A real gateway and worker, raw sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Final
from urllib.parse import urlsplit

from loadtest.chaos.asking import Heard, body, client, metric, stream
from loadtest.chaos.faults import Fault, Found, Size
from loadtest.chaos.services import entered, probe_of, sim_fleet
from loadtest.fleet import Fleet

FREE_S: Final = 0.1
STEP_S: Final = 2.59e-3  # of the simulated B200 with a row
SLOW_CLIENT_S: Final = 2.0  # the setting; 10 s unless told otherwise
FILL_S: Final = 15.0  # for some megabytes of the kernel's buffers, on a busy machine
NEIGHBOUR_GAP_S: Final = 1.0


async def _leaves(size: Size) -> list[Found]:
    """One row: whoever waits for it gets its first token as soon as the client before has gone."""
    found = []
    async with entered(sim_fleet("--max-rows", "1", "--max-waiting", "8")) as running:
        probe = await probe_of(running)
        try:
            free_before = (await asyncio.to_thread(probe.beat)).free_pages
            for way in ("while it streams", "as its answer begins", "with a half-closed connection"):
                worst_s = 0.0
                for _ in range(3):
                    worst_s = max(worst_s, await _take_over(running, way))
                found.append(
                    Found.within(
                        f"left {way}: its row is the next one's within two steps or 100 ms",
                        worst_s,
                        max(FREE_S, 2 * STEP_S) + 2 * STEP_S,  # the next one's own first step is in it
                        "the next request's first token, the slowest of 3",
                    )
                )
            for _ in range(8):
                await _hang_up(running.url, b'{"prompt": "half of a bo')
            beat = await asyncio.to_thread(probe.beat)
            found.append(
                Found(
                    "nothing is left of any of them",
                    f"{beat.num_running} running, {beat.num_waiting} waiting, {free_before - beat.free_pages} pages held",
                    not (beat.num_running or beat.num_waiting) and beat.free_pages == free_before,
                )
            )
        finally:
            await asyncio.to_thread(probe.close)
    return found


async def _take_over(running: Fleet, way: str) -> float:
    """Seconds from a client's leaving to the first token of the one behind it."""
    parts = urlsplit(running.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(_request(json.dumps(body("gone", 3000, stream=True)).encode()))
    data = b""
    while (b"data: {" if way == "while it streams" else b"HTTP/1.1") not in data:
        data += await reader.read(4096)
    async with client() as other:
        heard = Heard(0.0)
        waiting = asyncio.create_task(stream(other, running.url, body("next", 2), heard))
        await asyncio.sleep(0.1)  # it is accepted by now, and waits for the row
        left_s = time.perf_counter()
        if way.startswith("with a half"):
            writer.close()
        else:
            writer.transport.abort()
        await waiting
    writer.close()
    return heard.first_s - left_s if heard.is_whole else float("inf")


async def _hang_up(url: str, part: bytes) -> None:
    parts = urlsplit(url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(_request(part, announced=1000))
    await writer.drain()
    writer.transport.abort()


def _request(data: bytes, announced: int | None = None) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{announced or len(data)}\r\n\r\n".encode() + data


async def _stops_reading(size: Size) -> list[Found]:
    settings = {"slow_client_s": str(SLOW_CLIENT_S)}
    async with entered(sim_fleet(profile="small", settings=settings)) as running, client() as session:
        parts = urlsplit(running.url)
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(made, (parts.hostname, parts.port))
        asked = body("deaf", 12_000, stream=True, logprobs=5, n=8)
        await loop.sock_sendall(made, _request(json.dumps(asked).encode()))
        await loop.sock_recv(made, 1000)  # and then no more
        stopped_s = time.perf_counter()
        neighbour = asyncio.create_task(stream(session, running.url, body("neighbour", 4000)))
        cut_s = float("inf")
        memory_before = _resident_mb(running.gateways[0].pid)
        most_mb = 0.0
        while time.perf_counter() - stopped_s < 40.0:
            most_mb = max(most_mb, _resident_mb(running.gateways[0].pid) - memory_before)
            if await metric(session, running.url, "degas_slow_clients_total"):
                cut_s = time.perf_counter() - stopped_s
                break
            await asyncio.sleep(0.05)
        heard = await neighbour
        made.close()
    return [
        # First the buffers of the kernel have to fill, by tokens at half a millisecond each.
        Found.within(
            f"cut off {SLOW_CLIENT_S:g} s (as set) after its buffer was full", cut_s, SLOW_CLIENT_S + FILL_S, "cut off and counted"
        ),
        Found("its unread output is bounded", f"the gateway grew by {most_mb:.1f} MB at most", most_mb < 16.0),
        Found.within(
            "others notice nothing", heard.most_gap_s, NEIGHBOUR_GAP_S, f"a neighbour's stream is {heard.outcome}; its longest gap",
            also=heard.is_whole,
        ),
    ]  # fmt: skip


def _resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


FAULTS: Final = [
    Fault("leaves", "a client leaves, at any point", _leaves),
    Fault("stops-reading", "a client stops reading", _stops_reading),
]
