"""Owns one streamed `/v1/completions` request to any OpenAI-compatible server: body, reading, timing. The request's task.

The first token is timed at the first event with *text* in it; role events, empty deltas and comments do not count.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import msgspec

from loadtest.calls import OK, Call
from loadtest.surfaces import read_error_body

PATH = "/v1/completions"
MAX_EVENT_BYTES = 1 << 20


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    completion_tokens: int = 0


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: str | dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Event).decode


def build_body(model: str, prompt: str, max_tokens: int) -> bytes:
    """The request's JSON: greedy, streamed, usage at the end."""
    return msgspec.json.encode(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


class Reading:
    """The state of one stream, fed with bytes and the time at which they came."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._pending = b""
        self.has_ended = False  # a finish reason or [DONE] was there

    def feed(self, data: bytes, now_s: float) -> None:
        """Take in bytes of the body. Raises msgspec.DecodeError on an event that is not one."""
        *events, self._pending = (self._pending + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._on_data(line[5:].strip(), now_s)
        if len(self._pending) > MAX_EVENT_BYTES:
            self._call.on_end(now_s, "bad_event")

    def _on_data(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.has_ended = True
            return
        event = _decode(data)
        if event.error is not None:
            self._call.on_end(now_s, "error_event")
        if event.usage is not None:
            self._call.tokens = event.usage.completion_tokens
        for choice in event.choices:
            if choice.text:
                self._call.on_text(now_s)
            self.has_ended = self.has_ended or choice.finish_reason is not None

    def close(self, now_s: float, max_tokens: int) -> None:
        """The body has ended. An answer with fewer tokens than asked for counts as a failure, because it was less work."""
        if not self.has_ended:
            self._call.on_end(now_s, "truncated")
        elif not self._call.first_s:
            self._call.on_end(now_s, "no_text")
        elif self._call.tokens is not None and self._call.tokens != max_tokens:
            self._call.on_end(now_s, "wrong_length")
        self._call.on_end(now_s, OK)


async def complete(
    session: aiohttp.ClientSession, url: str, call: Call, body: bytes, max_tokens: int, timeout_s: float
) -> None:
    """Send one request and time its stream; whatever happens ends as the call's code, never as an exception."""
    call.sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s), session.post(url + PATH, data=body) as response:
            call.status = response.status
            if response.status != 200:
                error = await response.content.read(1 << 16)
                call.on_end(time.perf_counter(), read_error_body(error, response.status))
                return
            reading = Reading(call)
            async for data in response.content.iter_any():
                reading.feed(data, time.perf_counter())
            reading.close(time.perf_counter(), max_tokens)
    except TimeoutError:
        call.on_end(time.perf_counter(), "timeout")
    except aiohttp.ClientConnectorError:
        call.on_end(time.perf_counter(), "connection_refused")
    except (aiohttp.ClientError, OSError):
        call.on_end(time.perf_counter(), "disconnected")
    except msgspec.DecodeError:
        call.on_end(time.perf_counter(), "bad_event")
