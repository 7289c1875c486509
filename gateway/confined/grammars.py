"""Owns checking clients' grammars: which were checked, what was said, and who waits for what. Gateway's loop.

A grammar that compiles within the limits goes on to a worker; one that does not is refused here, with the
compiler's own words. Verdicts are remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter, OrderedDict
from typing import Final

import msgspec

from gateway.confined.compilers import CUT, DIED, Compilers
from gateway.confined.grammar_process import Answer
from gateway.generation import RequestError
from shared.errors import ErrorCode
from shared.protocol import Grammar

MAX_PENDING: Final = 256
MAX_PENDING_EACH: Final = 64  # of one tenant
MAX_VERDICTS: Final = 512
MAX_VERDICT_BYTES: Final = 16 << 20
FAILURE_KEPT_S: Final = (
    60.0  # a grammar whose process died twice is tried again later: that may have had other causes
)

_decode_answer = msgspec.msgpack.Decoder(Answer).decode


class GrammarChecker:
    """The compilers, the callers that wait for them, and the verdicts so far."""

    def __init__(self, compilers: Compilers | None = None) -> None:
        self.compilers = compilers or Compilers()
        self._verdicts: OrderedDict[bytes, tuple[Answer, float]] = (
            OrderedDict()
        )  # with the time until it counts
        self._verdict_bytes = 0
        self._jobs: dict[bytes, asyncio.Task[Answer]] = {}
        self._pending: Counter[str] = Counter()
        self.num_compiled = 0

    @property
    def num_pending(self) -> int:
        """Grammars being compiled or waiting for it."""
        return len(self._jobs)

    async def check(self, grammar: Grammar, *, param: str, tenant: str = "") -> Grammar:
        """The grammar as a worker takes it. Raises `RequestError` INVALID_GRAMMAR or QUEUE_FULL."""
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.source}".encode("utf-8", "surrogatepass")).digest()
        verdict = self._known(key)
        if verdict is None:
            job = self._jobs.get(key)
            if job is None:
                if len(self._jobs) >= MAX_PENDING or self._pending[tenant] >= MAX_PENDING_EACH:
                    message = f"{self._pending[tenant]} grammars are waiting to be compiled"
                    raise RequestError(ErrorCode.QUEUE_FULL, message, retry_after_s=1.0)
                self._pending[tenant] += 1
                job = self._jobs[key] = asyncio.create_task(self._judge(key, grammar, tenant))
                job.add_done_callback(_look_at)
            # Others may wait for the same job: one that goes leaves it running.
            verdict = await asyncio.shield(job)
        if verdict.error:
            message = f"{param}: the grammar cannot be used: {verdict.error}"
            raise RequestError(ErrorCode.INVALID_GRAMMAR, message, param=param)
        return Grammar(grammar.kind, verdict.source)

    async def stop(self) -> None:
        """End the jobs and the processes. Idempotent; a later check starts them again."""
        jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self.compilers.stop()

    # ------------------------------------------------------------ verdicts

    def _known(self, key: bytes) -> Answer | None:
        verdict, until_s = self._verdicts.get(key, (None, 0.0))
        if verdict is None or until_s < asyncio.get_running_loop().time():
            return None
        self._verdicts.move_to_end(key)
        return verdict

    def _remember(self, key: bytes, verdict: Answer, kept_s: float) -> None:
        self._forget(key)
        self._verdicts[key] = (verdict, asyncio.get_running_loop().time() + kept_s)
        self._verdict_bytes += _weight(verdict)
        while len(self._verdicts) > MAX_VERDICTS or self._verdict_bytes > MAX_VERDICT_BYTES:
            self._forget(next(iter(self._verdicts)))

    def _forget(self, key: bytes) -> None:
        known = self._verdicts.pop(key, None)
        if known is not None:
            self._verdict_bytes -= _weight(known[0])

    # ------------------------------------------------------------ one job

    async def _judge(self, key: bytes, grammar: Grammar, tenant: str) -> Answer:
        """One job, whatever happens; its verdict is remembered."""
        try:
            try:
                body = msgspec.msgpack.encode(grammar)
            except UnicodeEncodeError:
                return Answer("it holds half a surrogate pair")
            self.num_compiled += 1
            said = await self.compilers.run(tenant, body)
            if said.stuck:
                message = "compiling a grammar takes very long at the moment"
                raise RequestError(ErrorCode.QUEUE_FULL, message, retry_after_s=2.0)
            if said.how == CUT:
                verdict, kept_s = (
                    Answer(f"compiling it takes longer than {self.compilers.cpu_s:g} s"),
                    math.inf,
                )
            elif said.how == DIED:
                verdict, kept_s = Answer("compiling it takes more than it is allowed"), FAILURE_KEPT_S
            else:
                verdict, kept_s = _decode_answer(said.answer), math.inf
            self._remember(key, verdict, kept_s)
            return verdict
        finally:
            self._pending[tenant] -= 1
            if not self._pending[tenant]:
                del self._pending[tenant]
            self._jobs.pop(key, None)


def _weight(verdict: Answer) -> int:
    return len(verdict.error) + len(verdict.source) + 200


def _look_at(job: asyncio.Task[Answer]) -> None:
    """Take a job's exception, which nobody may be waiting for any more."""
    if not job.cancelled():
        job.exception()
