"""Owns turning submissions with a grammar into submissions with a constraint. Two threads of its own, a process each.

The I/O thread hands such submissions in. The first thread asks its process for an automaton, compiles what is not regular
with llguidance (which releases the global lock), and puts the result on to the decode thread's inbox; what needs more CPU
time than most goes on to the second, so that it holds up nothing but its like. In both, tenants take turns. A cancellation
that comes meanwhile follows its submission, in that order.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Final

import structlog

from shared.errors import ErrorCode
from shared.grammars import GrammarError
from shared.protocol import Cancel, Grammar, Rejected, Submit
from shared.turns import FairQueue
from worker.constraints.automaton import TokenAutomaton, sequence_tables
from worker.constraints.llg import LlgConstraint, Vocabulary, compile_llg
from worker.loop.inbox import CompiledSubmit, Inbox, Outbox, Received
from worker.wire.compile_child import CompilerProcess, Cut
from worker.wire.compiler_process import Setup, tables_of
from worker.wire.grammar_cache import GrammarCache

MAX_PENDING: Final = 256
QUICK_CPU_S: Final = 0.5  # with the model's vocabulary a grammar costs some times what it costs the gateway
CPU_S: Final = 4.0

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Pending:
    gateway: bytes
    message: Submit
    frames: list[bytes]
    cancelled: bool = False
    dropped: bool = False  # its gateway is gone, so no answer is sent


class _Lane:
    """What waits for one of the threads, under the compiler's lock, and the thread's process."""

    def __init__(self, name: str, cpu_s: float) -> None:
        self.name = name
        self.cpu_s = cpu_s
        self.waiting: FairQueue[_Pending] = FairQueue()
        self.process: CompilerProcess | None = None
        self.thread: threading.Thread | None = None


class GrammarCompiler:
    """The queue, the thread and the cache."""

    def __init__(self, inbox: Inbox, outbox: Outbox, epoch: int) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._epoch = epoch
        self._lock = threading.Condition()
        self._pending: dict[tuple[bytes, int], _Pending] = {}
        self.cache = GrammarCache()
        self._setup: Setup | None = None
        self._vocabulary: Vocabulary | None = None
        self._ended: TokenAutomaton | None = None
        self.quick = _Lane("quick", QUICK_CPU_S)
        self.slow = _Lane("slow", CPU_S)
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
        self._setup = setup = Setup(tokenizer_json, vocab_size, end_ids)
        # The constraint of a submission that was cancelled before its turn, and never runs.
        self._ended = TokenAutomaton(sequence_tables([[]], end_ids, vocab_size))
        for lane in (self.quick, self.slow):
            lane.process = CompilerProcess(setup)
            name = f"grammar-compiler-{lane.name}"
            lane.thread = threading.Thread(target=self._run, args=(lane,), name=name, daemon=True)
            lane.thread.start()

    def close(self) -> None:
        """End the threads and the processes; what is pending is refused."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        for lane in (self.quick, self.slow):
            if lane.process is not None:
                lane.process.kill()
        for lane in (self.quick, self.slow):
            if lane.thread is not None:
                lane.thread.join(2.0)
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
            if not (full or known):  # known: a frame delivered twice
                self._pending[key] = pending
                self._wait(self.quick, pending)
        if full and not known:
            self._reject(pending, ErrorCode.QUEUE_FULL, f"{MAX_PENDING} grammars wait to be compiled")

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

    def _wait(self, lane: _Lane, pending: _Pending) -> None:
        """Put a submission behind its tenant's others. Under the lock."""
        lane.waiting.push(f"{pending.gateway.hex()}/{pending.message.tenant}", pending)
        self._lock.notify_all()

    # ------------------------------------------------------------------ the compiler's threads

    def _run(self, lane: _Lane) -> None:
        assert lane.process is not None
        if lane is self.quick:
            try:
                lane.process.start()
            except Exception as error:  # the next grammar tries again; ended before it began is no failure
                if not self._closing:
                    log.error("grammar_process_failed", error=type(error).__name__, detail=str(error)[:300])
        while True:
            with self._lock:
                while not (self._closing or len(lane.waiting)):
                    self._lock.wait()
                if self._closing:
                    break
                pending = lane.waiting.pop()
            if not pending.dropped:
                self._settle_one(lane, pending)
        lane.process.end()

    def _settle_one(self, lane: _Lane, pending: _Pending) -> None:
        assert self._ended is not None
        try:
            constraint = self._ended if pending.cancelled else self._constraint(lane, pending.message)
        except Cut:
            with self._lock:
                self._wait(self.slow, pending)
        except GrammarError as error:
            self._settle(pending)
            if self._closing:
                self._reject(pending, ErrorCode.SHUTTING_DOWN, "the worker is shutting down")
            else:
                self._reject(pending, ErrorCode.INVALID_GRAMMAR, f"the grammar cannot be used: {error}")
        except Exception as error:
            log.exception("grammar_compiler_failed")
            self._settle(pending)
            self._reject(pending, ErrorCode.INTERNAL, f"compiling failed: {type(error).__name__}")
        else:
            self._hand_over(pending, constraint)

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

    def _constraint(self, lane: _Lane, message: Submit) -> LlgConstraint | TokenAutomaton:
        grammar = message.grammar
        assert grammar is not None
        with self._lock:
            constraint = self.cache.take(grammar)
            refusal = self.cache.refusal(grammar)
        if constraint is not None:
            return constraint
        if refusal is not None:
            raise GrammarError(refusal)
        made, num_bytes = self._compile(lane, grammar)
        with self._lock:
            self.cache.keep(grammar, made.fork(), num_bytes)
        return made

    def _compile(self, lane: _Lane, grammar: Grammar) -> tuple[LlgConstraint | TokenAutomaton, int]:
        """A constraint and its size in bytes. Raises `Cut` for the second lane, `GrammarError` for its sender."""
        if lane.process is None or self._vocabulary is None:
            raise GrammarError("this worker's tokenizer does not allow structured output")
        self.num_compiled += 1
        started_s = time.perf_counter()
        try:
            answer = lane.process.ask(grammar, lane.cpu_s)
        except Cut:
            if lane is self.quick:
                raise
            why = f"compiling it takes longer than {lane.cpu_s:g} s"
            with self._lock:
                self.cache.refuse(grammar, why)
            raise GrammarError(why) from None
        if answer.error:
            with self._lock:
                self.cache.refuse(grammar, answer.error)
            raise GrammarError(answer.error)
        made: LlgConstraint | TokenAutomaton
        made = TokenAutomaton(tables_of(answer)) if answer.tables else compile_llg(grammar, self._vocabulary)
        log.debug(
            "grammar_compiled",
            kind=grammar.kind,
            automaton=bool(answer.tables),
            num_bytes=answer.num_bytes,
            seconds=round(time.perf_counter() - started_s, 4),
        )
        return made, answer.num_bytes
