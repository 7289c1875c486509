"""Owns the clients of `degas bench chaos`: each asks again and again over SSE or WebSocket, and some hang up. Asyncio tasks.

A record of every request is kept: what its client saw, and when. Nothing here knows of workers or of kills.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

REFUSED: Final = frozenset({"loading", "queue_full", "rate_limited"})
"""Codes of requests that were never accepted: their clients were told so at once, and when to come again."""

ASK_AGAIN_S: Final = 0.25
LINGER_S: Final = 0.05


@dataclass(slots=True)
class Asked:
    """One request as its client saw it; times of `time.perf_counter`."""

    transport: str
    sent_s: float
    first_s: float = 0.0  # of its first token; 0: none
    end_s: float = 0.0  # of its first terminal event; 0: none
    code: str = ""  # of that event; empty: it ended well
    num_terminal: int = 0
    num_after: int = 0  # events behind the terminal one
    hung_up: bool = False

    @property
    def stayed(self) -> bool:
        """Its client waited for the end."""
        return not self.hung_up

    @property
    def accepted(self) -> bool:
        """It was not refused at the door."""
        return self.code not in REFUSED

    def on_text(self, now_s: float) -> None:
        """A token arrived."""
        self.num_after += self.num_terminal > 0
        if not self.first_s:
            self.first_s = now_s

    def on_terminal(self, now_s: float, code: str = "") -> None:
        """A terminal event arrived."""
        self.num_terminal += 1
        if self.num_terminal == 1:
            self.end_s, self.code = now_s, code


@dataclass(frozen=True, slots=True)
class Habits:
    """What the clients do."""

    tokens: int
    hang_up_share: float
    timeout_s: float


class Clients:
    """All clients. `asked` has every request, in the order of sending."""

    def __init__(self, url: str, num_clients: int, habits: Habits, *, seed: int) -> None:
        self.asked: list[Asked] = []
        self._url = url
        self._num = num_clients
        self._habits = habits
        self._seed = seed
        self._until_s = 0.0
        self._session: aiohttp.ClientSession | None = None

    async def run(self, seconds: float) -> None:
        """Ask for so long; return when every answer has come to its end, or its time limit."""
        self._until_s = time.perf_counter() + seconds
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            self._session = session
            await asyncio.gather(*(self._client(number) for number in range(self._num)))

    def stop(self) -> None:
        """Ask nothing new."""
        self._until_s = 0.0

    async def _client(self, number: int) -> None:
        rng = random.Random((self._seed << 20) + number)
        ask = self._ask_websocket if number % 2 else self._ask_sse
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        while time.perf_counter() < self._until_s:
            asked = Asked("websocket" if number % 2 else "sse", time.perf_counter())
            self.asked.append(asked)
            leaves_s = rng.uniform(0.0, 1.0) if rng.random() < self._habits.hang_up_share else None
            prompt = f"client {number}: {rng.randrange(1 << 30)}"
            try:
                async with asyncio.timeout(self._habits.timeout_s if leaves_s is None else leaves_s):
                    await ask(asked, prompt, rng.randint(self._habits.tokens // 2, 2 * self._habits.tokens))
            except TimeoutError:
                asked.hung_up = leaves_s is not None and not asked.num_terminal
            except (aiohttp.ClientError, OSError):
                pass  # no terminal event came, and the record says so
            if asked.code:
                await asyncio.sleep(rng.uniform(0.5, 1.5) * ASK_AGAIN_S)

    async def _ask_sse(self, asked: Asked, prompt: str, tokens: int) -> None:
        assert self._session is not None
        body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            if response.status != 200:
                asked.on_terminal(time.perf_counter(), _code_of(await response.json(content_type=None)))
                return
            async for line in response.content:
                if line.startswith(b"data: "):
                    _on_sse(asked, line[6:].strip())

    async def _ask_websocket(self, asked: Asked, prompt: str, tokens: int) -> None:
        assert self._session is not None
        message = {
            "type": "response.create",
            "stream_id": "a",
            "input": prompt,
            "max_output_tokens": tokens,
            "store": False,
        }
        url = "ws" + self._url.removeprefix("http") + "/v1/responses"
        timeout = aiohttp.ClientWSTimeout(ws_close=1.0)
        async with self._session.ws_connect(url, compress=0, timeout=timeout) as socket:
            await socket.send_str(json.dumps(message))
            async for event in socket:
                if event.type is aiohttp.WSMsgType.TEXT:
                    _on_response_event(asked, json.loads(event.data))
                if asked.num_terminal:
                    break
            try:
                event = await asyncio.wait_for(socket.receive(), LINGER_S)
            except TimeoutError:
                return
            if event.type is aiohttp.WSMsgType.TEXT:  # nothing may follow
                asked.num_after += 1


def _on_sse(asked: Asked, data: bytes) -> None:
    now_s = time.perf_counter()
    if data == b"[DONE]":
        asked.on_terminal(now_s)
        return
    event = json.loads(data)
    if "error" in event:
        asked.on_terminal(now_s, _code_of(event))
    elif any(choice.get("text") for choice in event.get("choices", ())):
        asked.on_text(now_s)


def _on_response_event(asked: Asked, event: dict[str, Any]) -> None:
    now_s = time.perf_counter()
    kind = event["type"]
    if kind == "response.output_text.delta":
        asked.on_text(now_s)
    elif kind in ("response.completed", "response.incomplete"):
        asked.on_terminal(now_s)
    elif kind in ("response.failed", "error"):
        asked.on_terminal(now_s, _code_of(event.get("response", event)))


def _code_of(body: dict[str, Any]) -> str:
    error = body.get("error")
    if not isinstance(error, dict):
        return "unknown"
    # The Responses interface has no code of its own for it.
    is_quarantined = "will not be tried again" in str(error.get("message"))
    return "quarantined" if is_quarantined else str(error.get("code") or "unknown")


async def until(condition: Callable[[], bool], timeout_s: float, *, poll_s: float = 0.02) -> bool:
    """Wait until it holds; False when it does not in time."""
    end_s = time.perf_counter() + timeout_s
    while not condition():
        if time.perf_counter() > end_s:
            return False
        await asyncio.sleep(poll_s)
    return True
