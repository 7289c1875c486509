"""Owns looking up the names that workers are found under, again and again. Gateway's loop; the lookups run on threads.

`dns://worker:5555` stands for every address of the name: a Compose service's containers, the pods of a headless service.
`file:///run/degas/workers` and `http://registry:5550/workers` are lists that somebody else keeps (`member_lists`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog

from gateway.core import member_lists
from gateway.decisions.membership import Membership
from gateway.faults import fault_fields

DNS: Final = "dns://"
SCHEMES: Final = (DNS, member_lists.FILE, *member_lists.HTTP)
_LOOKUP_TIMEOUT_S: Final = 10.0
_PATIENCE: Final = 5  # lookups that find nothing before anything was found, until that is worth a warning

log = structlog.get_logger(__name__)

Lookup = Callable[[], Awaitable[frozenset[str]]]


async def look_up(host: str, port: int) -> frozenset[str]:
    """The `tcp://` endpoints of a name. Raises OSError when there are none, TimeoutError when nobody answers."""
    async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return frozenset(
        f"tcp://[{address[0]}]:{port}" if family == socket.AF_INET6 else f"tcp://{address[0]}:{port}"
        for family, _, _, _, address in found
    )


def lookup_of(name: str) -> Lookup:
    """What finds the endpoints that a name of one of `SCHEMES` stands for. It raises OSError or ValueError when it cannot."""
    if name.startswith(member_lists.HTTP):
        return lambda: member_lists.read_page(name)
    if name.startswith(member_lists.FILE):
        path = Path(name.removeprefix(member_lists.FILE))
        return lambda: member_lists.read_file(path)
    host, _, port = name.removeprefix(DNS).rpartition(":")
    return lambda: look_up(host.strip("[]"), int(port))


class Discovery:
    """One name, looked up every `interval_s`.

    `join` and `leave` are told of endpoints that come and go, `is_idle` says whether nobody is reached at one. A lookup that
    fails changes nothing: `problem` tells of it.
    """

    def __init__(
        self,
        name: str,
        *,
        interval_s: float,
        join: Callable[[str], None],
        leave: Callable[[str], None],
        is_idle: Callable[[str], bool],
    ) -> None:
        """`name` begins with one of `SCHEMES`."""
        self.name = name
        self.problem = ""  # of the last lookup; empty if it had an answer
        self._num_failures = 0  # one after the other
        self._has_found = False
        self._interval_s = interval_s
        self._join, self._leave, self._is_idle = join, leave, is_idle
        self._lookup = lookup_of(name)
        self._members = Membership()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look up from now on; call once, on the running loop."""
        self._task = asyncio.create_task(self._run(), name=f"discovery {self.name}")

    def stop(self) -> None:
        """Look up no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()

    async def once(self) -> None:
        """Look up once, and tell what changed."""
        try:
            found = await self._lookup()
        except (OSError, ValueError) as error:  # TimeoutError is an OSError, UnicodeError a ValueError
            problem = f"{self.name} was not found: {error or 'nobody answered'}"
            self._num_failures += 1
            if problem != self.problem or self._num_failures == _PATIENCE:
                # A worker that starts beside its gateway has its name a moment later.
                is_early = not self._has_found and self._num_failures < _PATIENCE
                tell = log.info if is_early else log.warning
                tell("discovery_failed", name=self.name, reason=str(error) or "nobody answered")
            self.problem = problem
            return
        if self.problem:
            log.info("discovery_recovered", name=self.name)
        self.problem, self._num_failures, self._has_found = "", 0, True
        new, gone = self._members.on_answer(found, self._is_idle)
        for endpoint in new:
            log.info("worker_found", name=self.name, endpoint=endpoint)
            self._join(endpoint)
        for endpoint in gone:
            log.info("worker_forgotten", name=self.name, endpoint=endpoint)
            self._leave(endpoint)

    async def _run(self) -> None:
        while True:
            try:
                await self.once()
            except Exception as fault:  # one lookup's fault must not end the looking
                log.error("discovery_fault", name=self.name, **fault_fields(fault))
            await asyncio.sleep(self._interval_s)
