"""The compile service: order with cancellations, refusals, bounds, its process killed and replaced."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue

import pytest

from shared.errors import ErrorCode
from shared.protocol import Cancel, FromWorker, Grammar, Rejected, Submit, pack_i32
from worker.constraints.automaton import TokenAutomaton
from worker.constraints.llg import LlgConstraint
from worker.loop.inbox import Command, CompiledSubmit, Inbox, Received
from worker.sim.tokenizer import SIM_TOKENIZER, VOCAB_SIZE
from worker.wire import compiler as grammar_compiler
from worker.wire import grammar_cache
from worker.wire.compile_child import CompilerProcess, Cut
from worker.wire.compiler import GrammarCompiler
from worker.wire.compiler_process import Setup

GATEWAY = b"g"
SLOW = Grammar("json_schema", '{"type":"array","items":{"type":"integer","multipleOf":149993},"minItems":40}')
"""More than a second of CPU time."""


class Outbox:
    def __init__(self) -> None:
        self.sent: SimpleQueue[FromWorker] = SimpleQueue()

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        self.sent.put(message)

    def broadcast(self, message: FromWorker) -> None:
        raise AssertionError


class Service:
    def __init__(self) -> None:
        self.inbox: Inbox = SimpleQueue()
        self.outbox = Outbox()
        self.compiler = GrammarCompiler(self.inbox, self.outbox, epoch=1)
        self._next_id = 0

    def submit(self, kind: str, source: str, tenant: str = "") -> int:
        self._next_id += 1
        grammar = Grammar(kind, source)
        message = Submit(1, self._next_id, "r", pack_i32([20]), 5, tenant=tenant, grammar=grammar)
        self.compiler.submit(GATEWAY, message, [b"frame"])
        return self._next_id

    def cancel(self, sequence_id: int) -> None:
        """As the transport does it."""
        self.compiler.cancel(GATEWAY, [sequence_id])
        self.inbox.put(Received(GATEWAY, Cancel(1, [sequence_id])))

    def compiled(self, timeout_s: float = 10.0) -> CompiledSubmit:
        command = self.inbox.get(timeout=timeout_s)
        assert isinstance(command, CompiledSubmit)
        assert command.gateway == GATEWAY and command.frames == [b"frame"]
        return command

    def rejected(self, timeout_s: float = 10.0) -> Rejected:
        message = self.outbox.sent.get(timeout=timeout_s)
        assert isinstance(message, Rejected)
        return message


def cancelled(command: Command) -> list[tuple[str, int]]:
    assert isinstance(command, Received) and isinstance(command.message, Cancel)
    return [("cancel", sequence_id) for sequence_id in command.message.sequence_ids]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    service.compiler.open(SIM_TOKENIZER, VOCAB_SIZE, [0])
    yield service
    service.compiler.close()


def test_regular_grammars_become_automata_and_others_matchers(service: Service) -> None:
    service.submit("regex", r"\d+")
    service.submit("choice", '["a","b"]')
    service.submit("json_schema", '{"type":"boolean"}')
    service.submit("json_object", "")
    service.submit("lark", 'start: "(" start ")" | "x"')
    service.submit("regex", r"(a|b)*a(a|b){20}")
    kinds = [type(service.compiled().constraint) for _ in range(6)]
    assert kinds == [TokenAutomaton] * 3 + [LlgConstraint] * 3


def test_equal_grammars_are_compiled_once_and_share_tables(service: Service) -> None:
    for _ in range(5):
        service.submit("choice", '["a","b"]')
    constraints = [service.compiled().constraint for _ in range(5)]
    assert service.compiler.num_compiled == 1
    assert len({id(constraint) for constraint in constraints}) == 5
    tables = [constraint.tables for constraint in constraints if isinstance(constraint, TokenAutomaton)]
    assert len(tables) == 5 and all(table is tables[0] for table in tables)


def test_a_matcher_is_used_a_bounded_number_of_times(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_cache, "LLG_USES", 3)
    for _ in range(7):
        service.submit("json_object", "")
    for _ in range(7):
        service.compiled()
    assert service.compiler.num_compiled == 2  # the first of each is the one that was compiled


def test_the_cache_is_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_cache, "CACHE_BYTES", 1 << 20)
    for number in range(8):
        service.submit("lark", f'start: "{number}" start | "x"')
    for _ in range(8):
        service.compiled()
    assert 0 < service.compiler.cache.num_bytes <= 1 << 20 and 0 < len(service.compiler.cache) < 8


def test_a_bad_grammar_is_refused_by_name(service: Service) -> None:
    sequence_id = service.submit("regex", "(a")
    rejected = service.rejected()
    assert rejected.sequence_id == sequence_id and rejected.code is ErrorCode.INVALID_GRAMMAR
    assert "unclosed group" in rejected.message and rejected.param == "response_format"
    service.submit("regex", "a")
    service.compiled()


def test_a_cancellation_while_compiling_follows_its_submission(service: Service) -> None:
    ids = [service.submit("lark", f'start: "{number}"') for number in range(30)]
    service.cancel(ids[17])
    service.cancel(ids[29])
    order: list[tuple[str, int]] = []
    until_s = time.monotonic() + 10
    while sum(kind == "submit" for kind, _ in order) < 30 or service.compiler.num_pending:
        assert time.monotonic() < until_s
        try:
            command = service.inbox.get(timeout=0.1)
        except Empty:
            continue
        if isinstance(command, CompiledSubmit):
            order.append(("submit", command.message.sequence_id))
        else:
            order += cancelled(command)
    while not service.inbox.empty():
        order += cancelled(service.inbox.get())
    for sequence_id in (ids[17], ids[29]):
        last_cancel = max(i for i, item in enumerate(order) if item == ("cancel", sequence_id))
        assert last_cancel > order.index(("submit", sequence_id)), "the engine would miss it"


def test_a_gateway_that_is_gone_is_forgotten(service: Service) -> None:
    for number in range(10):
        service.submit("lark", f'start: "{number}"')
    service.compiler.drop_gateway(GATEWAY)
    assert service.compiler.num_pending == 0
    time.sleep(0.05)
    while not service.inbox.empty():
        service.inbox.get()
    sequence_id = service.submit("lark", 'start: "x"')
    assert service.compiled().message.sequence_id == sequence_id
    assert service.outbox.sent.empty()


def test_the_queue_is_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_PENDING", 0)
    service.submit("regex", "a")
    assert service.rejected().code is ErrorCode.QUEUE_FULL


def test_a_killed_process_is_replaced(service: Service) -> None:
    service.submit("regex", "a")
    service.compiled()
    process = service.compiler.quick.process
    assert process is not None and process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    service.submit("regex", "b")
    service.compiled()


def test_closing_refuses_what_is_pending() -> None:
    service = Service()
    service.compiler.open(SIM_TOKENIZER, VOCAB_SIZE, [0])
    for number in range(40):
        service.submit("lark", f'start: "{number}"')
    service.compiler.close()
    answered = service.inbox.qsize() + service.outbox.sent.qsize()
    assert answered == 40 and service.compiler.num_pending == 0


def test_without_a_tokenizer_grammars_are_unsupported() -> None:
    service = Service()
    service.compiler.open(b"", VOCAB_SIZE, [0])
    service.submit("regex", "a")
    assert service.rejected().code is ErrorCode.UNSUPPORTED
    service.compiler.close()


@pytest.mark.slow
def test_a_process_that_is_stuck_is_replaced_and_the_job_done() -> None:
    process = CompilerProcess(Setup(SIM_TOKENIZER, VOCAB_SIZE, [0]), patience=1.0)
    process.start()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert process.ask(Grammar("regex", "a"), 2.0).tables
    process.end()


def test_a_job_is_cut_at_its_limit_and_its_process_lives() -> None:
    process = CompilerProcess(Setup(SIM_TOKENIZER, VOCAB_SIZE, [0]))
    with pytest.raises(Cut):
        process.ask(SLOW, 0.05)
    pid = process.pid
    assert process.ask(Grammar("regex", "a"), 2.0).tables and process.pid == pid
    process.end()


@pytest.mark.slow
def test_slow_grammars_wait_for_each_other_only(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight grammars that are cut, of one tenant, and an ordinary one of another behind them."""
    service.compiler.quick.cpu_s, service.compiler.slow.cpu_s = 0.05, 0.1
    for number in range(8):
        service.submit("json_schema", SLOW.source.replace("149993", str(149993 + 2 * number)), tenant="slow")
    ordinary = service.submit("regex", "a", tenant="other")
    assert service.compiled().message.sequence_id == ordinary
    assert service.outbox.sent.qsize() < 8, "it waited for all of them"
    for _ in range(8):
        assert "longer than 0.1 s" in service.rejected().message
    num_compiled = service.compiler.num_compiled
    service.submit("json_schema", SLOW.source, tenant="slow")
    service.rejected()
    assert service.compiler.num_compiled == num_compiled, "the refusal was forgotten"


def test_what_a_cached_grammar_weighs_is_measured(service: Service) -> None:
    service.submit("json_schema", '{"type":"array","items":{"type":"integer","multipleOf":7}}')
    service.compiled()
    small = service.compiler.cache.num_bytes
    service.submit(
        "json_schema", '{"type":"array","items":{"type":"integer","multipleOf":9973},"minItems":40}'
    )
    service.compiled()
    assert service.compiler.cache.num_bytes - small > small


def test_hostile_schemas_come_back_within_the_limit(service: Service) -> None:
    wide = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1000)}}
    many = [f"[a-z]{{{i}}}x" for i in range(1, 300)]
    for kind, source in (
        ("json_schema", json.dumps(wide)),
        ("regex", "|".join(many)),
        ("regex", ".*" + "(a|b)" * 100 + ".{1000}"),
        ("choice", json.dumps([f"choice number {i}" for i in range(2000)])),
    ):
        started_s = time.perf_counter()
        service.submit(kind, source)
        while service.compiler.num_pending:
            assert time.perf_counter() - started_s < 60.0, kind
            time.sleep(0.005)
