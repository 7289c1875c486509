"""Owns following the file of API keys: read again when it changes, taken over whole or not at all. One task on the gateway's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from gateway.access import Access
from gateway.decisions.limits import Meters
from gateway.keys import KeysError, load

LOOK_EVERY_S: Final = 1.0

log = structlog.get_logger(__name__)


class KeyFile:
    """The file behind `access`. A file that cannot be used leaves the keys as they were, and is said once in the log."""

    def __init__(self, access: Access, meters: Meters, now: Callable[[], float]) -> None:
        self._access = access
        self._meters = meters
        self._now = now
        self._task: asyncio.Task[None] | None = None
        self._seen: tuple[int, int, int] | None = None  # it may have changed since `access` read it
        meters.set(access.entries, now())

    def start(self) -> None:
        """Follow the file, if there is one; call once, on the running loop."""
        if self._access.keys_file is not None:
            self._task = asyncio.create_task(self._follow(), name="keys-file")

    async def stop(self) -> None:
        """Follow it no more. Idempotent."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def refresh(self) -> None:
        """Take over the file if it has changed."""
        path = self._access.keys_file
        seen = self._look()
        if path is None or seen == self._seen:
            return
        self._seen = seen
        try:
            entries = await asyncio.to_thread(load, path)
        except KeysError as error:
            log.error("keys_file_refused", message=f"{path}: {error}; the keys stay as they were")
            return
        self._access.use(entries)
        self._meters.set(entries, self._now())
        log.info("keys_file_read", num_keys=len(entries))

    def _look(self) -> tuple[int, int, int] | None:
        path = self._access.keys_file
        if path is None:
            return None
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.refresh()
