"""Owns the gateway's compiling processes and whose turn it is to use one. Gateway's loop.

Most grammars compile in milliseconds: the first lane gives a job a quarter of a second of CPU time, and what needs more
goes on in a second lane, so that it holds up nothing but its like. In each lane tenants take turns.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec
import structlog

from gateway.confined.children import ask, end_child, start_child
from shared.forked_jobs import CUT, DIED, DONE, Job, Outcome
from shared.turns import FairQueue

QUICK_CPU_S: Final = 0.25
CPU_S: Final = 2.0
START_TIMEOUT_S: Final = 60.0
PATIENCE: Final = 15.0  # times the CPU time, on the clock: beyond, the machine or the process is stuck
PROCESS_BYTES: Final = 1 << 30
MODULE: Final = "gateway.confined.grammar_process"

log = structlog.get_logger(__name__)
_decode = msgspec.msgpack.Decoder(Outcome).decode


@dataclass(frozen=True, slots=True)
class Said:
    """How a job ended: DONE with its answer, CUT, or DIED. `stuck`: its process did not answer at all."""

    how: str
    answer: bytes = b""
    stuck: bool = False


class Lane:
    """A few processes that are started when first needed, and the tenants that take turns at them."""

    def __init__(self, num: int, cpu_s: float, patience: float = PATIENCE) -> None:
        self.cpu_s = cpu_s
        self._patience = patience
        self._free = num
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()
        self._idle: list[asyncio.subprocess.Process] = []
        self.processes: set[asyncio.subprocess.Process] = set()

    async def run(self, tenant: str, body: bytes) -> Said:
        """Do a job when it is the tenant's turn. A process that was lost is replaced, and the job tried again at once."""
        await self._take(tenant)
        try:
            for _ in range(2):
                said = await self._try(body)
                if said.how != DIED:
                    break
            return said
        finally:
            self._give()

    async def stop(self) -> None:
        """Kill the processes. Idempotent; a later job starts them again."""
        self._idle.clear()
        for process in list(self.processes):
            await self._end(process)

    async def _take(self, tenant: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.push(tenant, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give()
            raise

    def _give(self) -> None:
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    async def _try(self, body: bytes) -> Said:
        process = self._idle.pop() if self._idle else None
        is_sound = False
        try:
            timeout_s = self.cpu_s * self._patience
            if process is None or process.returncode is not None:
                if process is not None:
                    self.processes.discard(process)
                process = await start_child(MODULE, PROCESS_BYTES)
                self.processes.add(process)
                timeout_s += START_TIMEOUT_S  # the libraries are read before its first job
            async with asyncio.timeout(timeout_s):
                header, answer = await ask(process, msgspec.msgpack.encode(Job(self.cpu_s)), body)
            outcome = _decode(header)
            is_sound = True
        except TimeoutError:
            log.warning("grammar_process_stuck")
            return Said(DIED, stuck=True)
        except (OSError, EOFError):
            log.warning("grammar_process_died")
            return Said(DIED)
        finally:
            if process is not None:
                if is_sound:
                    self._idle.append(process)
                else:
                    await self._end(process)
        if outcome.how == CUT:
            log.info("grammar_cut", cpu_s=round(outcome.cpu_s, 2))
        return Said(outcome.how, answer)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self.processes.discard(process)
        await end_child(process)


class Compilers:
    """The two lanes."""

    def __init__(
        self, *, quick_cpu_s: float = QUICK_CPU_S, cpu_s: float = CPU_S, patience: float = PATIENCE
    ) -> None:
        self.cpu_s = cpu_s
        self.quick = Lane(2, min(quick_cpu_s, cpu_s), patience)
        self.slow = Lane(1, cpu_s, patience)

    async def run(self, tenant: str, body: bytes) -> Said:
        """Do a job in the first lane, or, if it is cut there, in the second."""
        said = await self.quick.run(tenant, body)
        if said.how == CUT and self.quick.cpu_s < self.slow.cpu_s:
            said = await self.slow.run(tenant, body)
        return said

    async def stop(self) -> None:
        """Kill the processes. Idempotent."""
        await self.quick.stop()
        await self.slow.stop()


__all__ = ["CUT", "DIED", "DONE", "Compilers", "Lane", "Said"]
