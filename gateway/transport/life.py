"""Owns signs of life on a stream that waits: in the queue, in a long prefill, between slow tokens. Gateway's loop.

Proxies and clients give up on a connection that says nothing for long. Nothing is done per token: twice in an interval
somebody looks whether anything was written since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.transport.bounded import BoundedWriter


class LifeSign:
    """Writes `sign` whenever `is_waited_for` and nothing else was written for `every_s`, until `close`."""

    __slots__ = ("_every_s", "_is_waited_for", "_loop", "_seen_bytes", "_sign", "_timer", "_writer")

    def __init__(
        self,
        writer: BoundedWriter,
        sign: bytes,
        every_s: float,
        is_waited_for: Callable[[], bool] = lambda: True,
    ) -> None:
        self._writer = writer
        self._sign = sign
        self._every_s = every_s
        self._is_waited_for = is_waited_for
        self._loop = asyncio.get_running_loop()
        self._seen_bytes = writer.written_bytes
        self._timer = self._loop.call_later(every_s / 2, self._look)

    def close(self) -> None:
        """Say nothing more. Idempotent."""
        self._timer.cancel()

    def say(self) -> None:
        """Write the sign now."""
        self._writer.write(self._sign)

    def _look(self) -> None:
        if self._writer.closed:
            return
        if self._writer.written_bytes == self._seen_bytes and self._is_waited_for():
            self.say()
        self._seen_bytes = self._writer.written_bytes
        self._timer = self._loop.call_later(self._every_s / 2, self._look)
