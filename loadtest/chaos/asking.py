"""Owns one streamed request as a client sees it, for the table of faults. Asyncio tasks; times of `time.perf_counter`."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

TIMEOUT_S: Final = 60.0


@dataclass(slots=True)
class Heard:
    """What came back. `first` is set with the first token."""

    sent_s: float
    status: int = 0
    text: str = ""
    finish: str = ""  # the finish reason
    code: str = ""  # of the error
    message: str = ""
    num_terminal: int = 0
    num_after: int = 0  # events behind the terminal one
    num_tokens: int = 0
    cached_tokens: int = 0
    first_s: float = 0.0
    end_s: float = 0.0
    most_gap_s: float = 0.0
    is_cut: bool = False  # the connection ended, or was reset, before a terminal event
    first: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_whole(self) -> bool:
        """Exactly one good end."""
        return (
            self.status == 200
            and not self.code
            and not self.is_cut
            and self.num_terminal == 1
            and not self.num_after
        )

    @property
    def outcome(self) -> str:
        """In one word."""
        if self.is_whole:
            return "whole"
        return "cut" if self.is_cut else self.code or f"http {self.status}"


def client() -> aiohttp.ClientSession:
    """A session that keeps no connection: a server may close one whose stream failed just as it is used again."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))


def body(prompt: str | list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """A completion that runs to its limit."""
    return {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, **more}


async def stream(
    session: aiohttp.ClientSession, url: str, asked: dict[str, Any], heard: Heard | None = None
) -> Heard:
    """Ask and read to the end. Never raises for what a server does; `heard` is filled while it runs."""
    heard = heard or Heard(time.perf_counter())
    heard.sent_s = time.perf_counter()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    last_s = 0.0
    try:
        async with session.post(f"{url}/v1/completions", json=asked | options) as response:
            heard.status = response.status
            if response.status != 200:
                _on_error(heard, await response.json(content_type=None))
                heard.end_s = time.perf_counter()
                return heard
            async for line in response.content:
                if line.startswith(b"data: "):
                    now_s = time.perf_counter()
                    if _on_event(heard, line[6:].strip()):
                        heard.most_gap_s = max(heard.most_gap_s, now_s - last_s if last_s else 0.0)
                        last_s = now_s
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        pass
    if not heard.num_terminal:
        heard.is_cut = True
        heard.end_s = time.perf_counter()
    return heard


async def whole(session: aiohttp.ClientSession, url: str, asked: dict[str, Any]) -> Heard:
    """The same question, answered in one piece."""
    heard = Heard(time.perf_counter())
    try:
        async with session.post(f"{url}/v1/completions", json=asked) as response:
            heard.status = response.status
            said = await response.json(content_type=None)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        heard.is_cut = True
    else:
        if heard.status != 200:
            _on_error(heard, said)
        else:
            heard.num_terminal = 1
            heard.text, heard.finish = said["choices"][0]["text"], said["choices"][0]["finish_reason"]
            heard.num_tokens = said["usage"]["completion_tokens"]
    heard.end_s = time.perf_counter()
    return heard


async def readiness(session: aiohttp.ClientSession, url: str) -> int:
    """The status of /readyz; 0: nobody answers."""
    try:
        async with session.get(f"{url}/readyz") as response:
            return response.status
    except (aiohttp.ClientError, OSError, TimeoutError):
        return 0


async def metric(session: aiohttp.ClientSession, url: str, name: str, **labels: str) -> float:
    """A metric's samples with these labels, added up; 0 where there is none."""
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith((name + "{", name + " ")) and all(label in line for label in wanted)
    )


def _on_event(heard: Heard, data: bytes) -> bool:
    """Whether it held text."""
    now_s = time.perf_counter()
    heard.num_after += heard.num_terminal > 0
    if data == b"[DONE]":
        heard.num_terminal += 1
        heard.end_s = now_s
        return False
    event = json.loads(data)
    if "error" in event:
        heard.num_terminal += 1
        heard.end_s = now_s
        _on_error(heard, event)
        return False
    if usage := event.get("usage"):
        heard.num_tokens = usage.get("completion_tokens", 0)
        heard.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    for choice in event.get("choices", ()):
        heard.text += choice.get("text") or ""
        heard.finish = choice.get("finish_reason") or heard.finish
        if choice.get("text"):
            heard.first_s = heard.first_s or now_s
            heard.first.set()
            return True
    return False


def _on_error(heard: Heard, said: Any) -> None:
    error = said.get("error") if isinstance(said, dict) else None
    heard.code = str(error.get("code") or "unknown") if isinstance(error, dict) else "unknown"
    heard.message = str(error.get("message", "")) if isinstance(error, dict) else ""
