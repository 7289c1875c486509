"""Owns waiting for a worker's recorded steps, one recording a worker at a time. Gateway's loop."""

from __future__ import annotations

import asyncio

from gateway.core.worker_link import WorkerLink
from gateway.generation import RequestError
from shared.errors import ErrorCode


class Recordings:
    """The recordings that were asked for and have not arrived."""

    def __init__(self) -> None:
        self._awaited: dict[WorkerLink, asyncio.Future[bytes]] = {}

    async def record(self, link: WorkerLink, num_steps: int, timeout_s: float) -> bytes:
        """The worker's next steps as Chrome-trace JSON. Raises `RequestError` QUEUE_FULL or DEADLINE_EXCEEDED."""
        if link in self._awaited:
            raise RequestError(ErrorCode.QUEUE_FULL, "a recording is running")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._awaited[link] = future
        try:
            link.record(num_steps)
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            message = f"the worker ran fewer than {num_steps} steps in {timeout_s:g} s"
            raise RequestError(ErrorCode.DEADLINE_EXCEEDED, message) from None
        finally:
            self._awaited.pop(link, None)

    def on_recording(self, link: WorkerLink, recording: bytes) -> None:
        """A recording arrived."""
        future = self._awaited.get(link)
        if future is not None and not future.done():
            future.set_result(recording)
