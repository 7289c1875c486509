"""Owns one request over server-sent events: POST, read, time. Runs in the request's own task."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import aiohttp
import msgspec

from loadtest.calls import LEFT, Call
from loadtest.surfaces import PATHS, Fact, read_chat_event, read_query_event, read_refusal

MAX_EVENT_BYTES: Final = 1 << 20
MAX_ERROR_BYTES: Final = 64 << 10

_READERS: Final[dict[str, Callable[[bytes], Fact]]] = {
    "query": read_query_event,
    "chat": read_chat_event,
    "completions": read_chat_event,
}
SLOW_BUFFER_BYTES: Final = 4096  # of a slow reader's socket and of what is read ahead


def key_headers(api_key: str | None) -> dict[str, str]:
    """The headers that carry a key, under the names each interface's own client uses."""
    if api_key is None:
        return {}
    return {"Authorization": f"Bearer {api_key}", "X-Moondream-Auth": api_key}


async def stream(
    session: aiohttp.ClientSession, base_url: str, call: Call, body: bytes, timeout_s: float
) -> None:
    """Send one request and time its stream; whatever happens ends as the call's code, never as an exception."""
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(session, base_url + PATHS[call.surface], call, body)
    except TimeoutError:
        call.on_end(time.perf_counter(), "timeout")
    except aiohttp.ClientConnectorError as error:
        call.on_end(time.perf_counter(), "connection_refused", str(error))
    except aiohttp.ServerTimeoutError:
        call.on_end(time.perf_counter(), "timeout")
    except aiohttp.ClientResponseError:
        call.on_end(time.perf_counter(), "bad_response")  # not HTTP, or bytes of another answer
    except (aiohttp.ClientError, ConnectionError, OSError):
        call.on_end(time.perf_counter(), "disconnected")
    except msgspec.DecodeError:
        call.on_end(time.perf_counter(), "bad_event")
    finally:
        call.on_end(time.perf_counter(), "unfinished")  # changes a call only if this task was cancelled


async def _stream(session: aiohttp.ClientSession, url: str, call: Call, body: bytes) -> None:
    read = _READERS[call.surface]
    call.sent_s = time.perf_counter()
    ahead = SLOW_BUFFER_BYTES if call.pause_s else 1 << 16
    async with session.post(url, data=body, read_bufsize=ahead) as response:
        call.status = response.status
        if response.status != 200:
            error = await response.content.read(MAX_ERROR_BYTES)
            call.on_end(time.perf_counter(), *read_refusal(error, response.status))
            return
        pending = b""
        async for data in response.content.iter_any():
            now_s = time.perf_counter()
            *events, pending = (pending + data).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                _count_event(call, event, read, now_s)
            if call.wants_to_leave:
                call.on_end(now_s, LEFT)
                return  # which closes the connection, since the answer has not ended
            if len(pending) > MAX_EVENT_BYTES:
                call.on_end(now_s, "bad_event")
                return
            if call.pause_s and not call.ended:
                await asyncio.sleep(call.pause_s)
    call.on_end(time.perf_counter(), "truncated")  # unless a terminal event came first


def _count_event(call: Call, event: bytes, read: Callable[[bytes], Fact], now_s: float) -> None:
    if call.ended:
        return
    for line in event.split(b"\n"):
        if not line.startswith(b"data:"):
            continue  # comments, ids and event names add nothing to the data
        fact = read(line[5:].strip())
        if fact.text:
            call.on_text(now_s, fact.text)
        if fact.tokens is not None:
            call.tokens = fact.tokens
        call.is_cut |= fact.is_cut
        if fact.error is not None:
            call.on_end(now_s, fact.error, fact.message)
        elif fact.done:
            call.on_end(now_s)
