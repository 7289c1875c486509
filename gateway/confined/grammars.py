"""Owns checking clients' grammars, in one limited process that is started when first needed. Gateway's loop.

A grammar that compiles within the limits goes on to a worker; one that does not is refused here, with the
compiler's own words. Verdicts are remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from typing import Final

import msgspec
import structlog

from gateway.confined.children import ask, end_child, start_child
from gateway.confined.grammar_process import Answer
from gateway.generation import RequestError
from shared.errors import ErrorCode
from shared.protocol import Grammar

MAX_PENDING: Final = 64
MAX_VERDICTS: Final = 512  # most are a few hundred bytes, none above 64 KiB
TIMEOUT_S: Final = 2.0
START_TIMEOUT_S: Final = 10.0
PROCESS_BYTES: Final = 1 << 30
FAILURE_KEPT_S: Final = 60.0  # a grammar that was too slow is tried again: the machine may have been busy

log = structlog.get_logger(__name__)
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


class GrammarChecker:
    """The process, the callers that wait for it, and the verdicts so far."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._verdicts: OrderedDict[bytes, tuple[Answer, float]] = (
            OrderedDict()
        )  # each with the time until it counts
        self.process: asyncio.subprocess.Process | None = None
        self.num_pending = 0
        self.num_compiled = 0

    async def check(self, grammar: Grammar, *, param: str) -> Grammar:
        """The grammar as a worker takes it. Raises `RequestError` INVALID_GRAMMAR or QUEUE_FULL."""
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.source}".encode("utf-8", "surrogatepass")).digest()
        verdict = self._known(key)
        if verdict is None:
            if self.num_pending >= MAX_PENDING:
                message = f"{MAX_PENDING} grammars are waiting to be compiled"
                raise RequestError(ErrorCode.QUEUE_FULL, message, retry_after_s=1.0)
            self.num_pending += 1
            try:
                async with self._turn:
                    verdict = self._known(key)
                    if verdict is None:
                        verdict, kept_s = await self._judge(grammar)
                        self._verdicts[key] = (verdict, asyncio.get_running_loop().time() + kept_s)
            finally:
                self.num_pending -= 1
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if verdict.error:
            message = f"{param}: the grammar cannot be used: {verdict.error}"
            raise RequestError(ErrorCode.INVALID_GRAMMAR, message, param=param)
        return Grammar(grammar.kind, verdict.source)

    async def stop(self) -> None:
        """Kill the process. Idempotent; a later check starts it again."""
        process, self.process = self.process, None
        if process is not None:
            await end_child(process)

    def _known(self, key: bytes) -> Answer | None:
        verdict, until_s = self._verdicts.get(key, (None, 0.0))
        if verdict is None or until_s < asyncio.get_running_loop().time():
            return None
        self._verdicts.move_to_end(key)
        return verdict

    # ------------------------------------------------------------ the process

    async def _judge(self, grammar: Grammar) -> tuple[Answer, float]:
        """One job, whatever happens, and how long its verdict counts. A process in doubt is ended; the next job
        starts another."""
        try:
            data = msgspec.msgpack.encode(grammar)
        except UnicodeEncodeError:
            return Answer("it holds half a surrogate pair"), FAILURE_KEPT_S
        self.num_compiled += 1
        is_sound = False
        try:
            timeout_s = self._timeout_s
            if self.process is None or self.process.returncode is not None:
                await self.stop()
                self.process = await start_child("gateway.confined.grammar_process", PROCESS_BYTES)
                timeout_s += START_TIMEOUT_S  # the libraries are read on its first job
            async with asyncio.timeout(timeout_s):
                answer = _decode_answer((await ask(self.process, data))[0])
            is_sound = True
        except TimeoutError:
            log.warning("grammar_too_slow", kind=grammar.kind)
            return Answer(f"compiling it takes longer than {self._timeout_s:g} s"), FAILURE_KEPT_S
        except (OSError, EOFError):
            log.warning("grammar_process_died", kind=grammar.kind)
            return Answer("compiling it takes more than it is allowed"), FAILURE_KEPT_S
        finally:
            if not is_sound:
                await self.stop()
        return answer, math.inf
