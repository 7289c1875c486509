"""Owns turning submissions with a grammar into submissions with a constraint. Its own thread, and a process.

The I/O thread hands such submissions in; the compiler's thread asks its process for an automaton, compiles what
is not regular with llguidance (which releases the global lock), and puts the result on to the decode thread's
inbox. A cancellation that comes meanwhile follows its submission there, in that order.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

import msgspec
import structlog

from shared import confined
from shared.errors import ErrorCode
from shared.grammars import GrammarError
from shared.protocol import Cancel, Grammar, Rejected, Submit
from worker.constraints.automaton import TokenAutomaton, sequence_tables
from worker.constraints.llg import LlgConstraint, Vocabulary, compile_llg
from worker.loop.inbox import CompiledSubmit, Inbox, Outbox, Received
from worker.wire.compiler_process import Answer, Setup, tables_of

MAX_PENDING: Final = 256
COMPILE_TIMEOUT_S: Final = 2.0
START_TIMEOUT_S: Final = 30.0
PROCESS_BYTES: Final = 3 << 30
CACHE_BYTES: Final = 64 << 20
LLG_BYTES: Final = 1 << 20  # what a compiled llguidance grammar is taken to weigh
LLG_USES: Final = 256  # forks share a growing lexer: start afresh after so many

log = structlog.get_logger()
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


@dataclass(slots=True, eq=False)
class _Pending:
    gateway: bytes
    message: Submit
    frames: list[bytes]
    cancelled: bool = False
    dropped: bool = False  # its gateway is gone, so no answer is sent


@dataclass(slots=True)
class _Compiled:
    constraint: LlgConstraint | TokenAutomaton
    num_bytes: int
    uses: int = 0


class GrammarCompiler:
    """The queue, the thread and the cache."""

    def __init__(self, inbox: Inbox, outbox: Outbox, epoch: int) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._epoch = epoch
        self._queue: SimpleQueue[_Pending | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._pending: dict[tuple[bytes, int], _Pending] = {}
        self._cache: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()
        self._cache_bytes = 0
        self._setup: Setup | None = None
        self._vocabulary: Vocabulary | None = None
        self._process: CompilerProcess | None = None
        self._thread = threading.Thread(target=self._run, name="grammar-compiler", daemon=True)
        self._closing = False
        self.num_compiled = 0

    # ------------------------------------------------------------------ any thread

    def open(self, tokenizer_json: bytes, vocab_size: int, end_ids: list[int]) -> None:
        """Start compiling for this vocabulary; before the worker serves, since reading it holds the global lock
        for a moment. Without a tokenizer llguidance can read every grammar is refused."""
        if not (tokenizer_json and end_ids):
            return
        try:
            self._vocabulary = Vocabulary(tokenizer_json, vocab_size, end_ids)
        except Exception as error:  # the library raises many kinds
            log.error("grammars_unavailable", error=type(error).__name__, detail=str(error)[:300])
            return
        self._setup = Setup(tokenizer_json, vocab_size, end_ids)
        self._thread.start()

    def close(self) -> None:
        """End the thread and the process; what is pending is refused."""
        self._closing = True
        if self._thread.is_alive():
            self._queue.put(None)
            if self._process is not None:
                self._process.kill()
            self._thread.join(2.0)
        with self._lock:
            left, self._pending = list(self._pending.values()), {}
        for pending in left:
            self._reject(pending, ErrorCode.SHUTTING_DOWN, "the worker is shutting down")

    @property
    def num_pending(self) -> int:
        """Submissions waiting for their grammar."""
        return len(self._pending)

    # ------------------------------------------------------------------ the I/O thread

    def submit(self, gateway: bytes, message: Submit, frames: list[bytes]) -> None:
        """Take a submission with a grammar; its answer or its place in the inbox follows."""
        pending = _Pending(gateway, message, frames)
        if self._setup is None:
            self._reject(pending, ErrorCode.UNSUPPORTED, "structured output is not available on this worker")
            return
        key = (gateway, message.sequence_id)
        with self._lock:
            full = len(self._pending) >= MAX_PENDING
            known = key in self._pending
            if not (full or known):
                self._pending[key] = pending
        if full and not known:
            self._reject(pending, ErrorCode.QUEUE_FULL, f"{MAX_PENDING} grammars wait to be compiled")
        elif not known:  # else a frame delivered twice
            self._queue.put(pending)

    def cancel(self, gateway: bytes, sequence_ids: list[int]) -> None:
        """Note a cancellation. The caller passes it to the inbox afterwards, for those that are there already."""
        with self._lock:
            for sequence_id in sequence_ids:
                pending = self._pending.get((gateway, sequence_id))
                if pending is not None:
                    pending.cancelled = True

    def drop_gateway(self, gateway: bytes) -> None:
        """Forget everything a gateway handed in: its lease ran out."""
        with self._lock:
            for key in [key for key in self._pending if key[0] == gateway]:
                self._pending.pop(key).dropped = True

    # ------------------------------------------------------------------ the compiler's thread

    def _run(self) -> None:
        setup = self._setup
        assert setup is not None
        # The constraint of a submission that was cancelled before its turn, and never runs.
        ended = TokenAutomaton(sequence_tables([[]], setup.end_ids, setup.vocab_size))
        process = self._process = CompilerProcess(setup)
        try:
            process.start()
        except Exception as error:  # the next grammar tries again
            log.error("grammar_process_failed", error=type(error).__name__, detail=str(error)[:300])
        while (pending := self._queue.get()) is not None:
            if pending.dropped:
                continue
            try:
                constraint = ended if pending.cancelled else self._constraint(pending.message)
            except GrammarError as error:
                self._settle(pending)
                if self._closing:
                    self._reject(pending, ErrorCode.SHUTTING_DOWN, "the worker is shutting down")
                else:
                    self._reject(pending, ErrorCode.INVALID_GRAMMAR, f"the grammar cannot be used: {error}")
                continue
            except Exception as error:
                log.exception("grammar_compiler_failed")
                self._settle(pending)
                self._reject(pending, ErrorCode.INTERNAL, f"compiling failed: {type(error).__name__}")
                continue
            self._hand_over(pending, constraint)
        process.end()

    def _hand_over(self, pending: _Pending, constraint: LlgConstraint | TokenAutomaton) -> None:
        """Put the submission into the inbox under the lock, so that a cancellation is either noted before or follows it."""
        gateway, message = pending.gateway, pending.message
        with self._lock:
            key = (gateway, message.sequence_id)
            if self._pending.get(key) is not pending:
                return
            del self._pending[key]
            self._inbox.put(CompiledSubmit(gateway, message, pending.frames, constraint))
            if pending.cancelled:
                self._inbox.put(Received(gateway, Cancel(message.epoch, [message.sequence_id])))

    def _settle(self, pending: _Pending) -> None:
        with self._lock:
            key = (pending.gateway, pending.message.sequence_id)
            if self._pending.get(key) is pending:
                del self._pending[key]
            else:
                pending.dropped = True

    def _reject(self, pending: _Pending, code: ErrorCode, text: str) -> None:
        if not pending.dropped:
            message = Rejected(self._epoch, pending.message.sequence_id, code, text, "response_format")
            self._outbox.send(pending.gateway, message)

    def _constraint(self, message: Submit) -> LlgConstraint | TokenAutomaton:
        grammar = message.grammar
        assert grammar is not None
        key = (grammar.kind, grammar.source)
        known = self._cache.get(key)
        if known is None:
            known = self._compile(grammar)
            self._cache[key] = known
            self._cache_bytes += known.num_bytes
            while self._cache_bytes > CACHE_BYTES and len(self._cache) > 1:
                self._cache_bytes -= self._cache.popitem(last=False)[1].num_bytes
        self._cache.move_to_end(key)
        known.uses += 1
        constraint = known.constraint.fork()
        if isinstance(constraint, LlgConstraint) and known.uses >= LLG_USES:
            del self._cache[key]
            self._cache_bytes -= known.num_bytes
        return constraint

    def _compile(self, grammar: Grammar) -> _Compiled:
        if self._process is None or self._vocabulary is None:
            raise GrammarError("this worker's tokenizer does not allow structured output")
        self.num_compiled += 1
        started_s = time.perf_counter()
        answer = self._process.ask(grammar)
        if answer.error:
            raise GrammarError(answer.error)
        compiled: _Compiled
        if answer.tables:
            tables = tables_of(answer)
            compiled = _Compiled(TokenAutomaton(tables), tables.num_bytes)
        else:
            compiled = _Compiled(compile_llg(grammar, self._vocabulary), LLG_BYTES)
        log.debug(
            "grammar_compiled",
            kind=grammar.kind,
            automaton=bool(answer.tables),
            seconds=round(time.perf_counter() - started_s, 4),
        )
        return compiled


class CompilerProcess:
    """The process that compiles; replaced when it died or took too long. Compiler's thread, but for `kill`."""

    def __init__(self, setup: Setup, *, timeout_s: float = COMPILE_TIMEOUT_S) -> None:
        self._setup = msgspec.msgpack.encode(setup)
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def ask(self, grammar: Grammar) -> Answer:
        """Compile there. Raises `GrammarError` when that takes too long, or more memory than allowed."""
        try:
            if self._process is None or self._process.poll() is not None:
                self.start()
            return self._exchange(msgspec.msgpack.encode(grammar), self._timeout_s)
        except TimeoutError:
            self.end()
            raise GrammarError(f"compiling it takes longer than {self._timeout_s:g} s") from None
        except (OSError, EOFError):
            self.end()
            raise GrammarError("compiling it takes more than it is allowed") from None

    def kill(self) -> None:
        """Kill it for good; the compiler's thread sees its pipe end. Any thread."""
        self._killed = True
        process = self._process
        if process is not None:
            process.kill()

    def start(self) -> None:
        """Start it and give it the vocabulary. Raises TimeoutError, OSError or EOFError."""
        if self._killed:
            raise GrammarError("the worker is shutting down")
        self.end()
        self._process = subprocess.Popen(
            confined.command("worker.wire.compiler_process", PROCESS_BYTES),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=confined.environment() | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            bufsize=0,
            start_new_session=True,  # a Ctrl-C at the terminal is the worker's to handle
        )
        self._exchange(self._setup, START_TIMEOUT_S)

    def end(self) -> None:
        """Kill it, wait for it and close its pipes."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def _exchange(self, data: bytes, timeout_s: float) -> Answer:
        """One message there and its answer back. Raises TimeoutError, OSError or EOFError."""
        process = self._process
        if process is None:
            raise EOFError
        assert process.stdin is not None and process.stdout is not None
        # The process reads a whole message before it works on it, so writing does not wait for the work.
        view = memoryview(confined.pack(data))
        while view:
            view = view[process.stdin.write(view) or 0 :]
        until_s = time.monotonic() + timeout_s
        source = process.stdout.fileno()
        prefix = _read_exactly(source, confined.PREFIX.size, until_s)
        return _decode_answer(_read_exactly(source, sum(confined.PREFIX.unpack(prefix)), until_s))


def _read_exactly(source: int, size: int, until_s: float) -> bytes:
    parts: list[bytes] = []
    poller = select.poll()
    poller.register(source, select.POLLIN)
    while size:
        left_s = until_s - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise TimeoutError
        data = os.read(source, min(size, 1 << 20))
        if not data:
            raise EOFError
        parts.append(data)
        size -= len(data)
    return b"".join(parts)
