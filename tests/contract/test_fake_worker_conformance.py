"""The fake worker keeps the promises of the real one: the same script of frames against both."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import zmq

from loadtest.peers.waiting import Watched, wait_until
from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import FakeWorker, text_ids

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


class Place(NamedTuple):
    """Where a worker answers, and its process if it is a real one."""

    endpoint: str
    processes: tuple[Watched, ...] = ()


@pytest.fixture(scope="module", params=["fake", "real"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if request.param == "fake":
        with FakeWorker() as worker:
            worker.reply("x" * 2000)
            yield Place(worker.endpoint)
        return
    address = f"ipc://{tmp_path_factory.mktemp('w')}/w"
    command = [
        "-m",
        "worker",
        "--endpoint",
        address,
        "--model",
        "sim",
        "--device",
        "sim",
        "--log-level",
        "error",
    ]
    log = tmp_path_factory.mktemp("log") / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output)
    try:
        yield Place(address, (Watched("the worker", process, log),))
    finally:
        process.kill()
        process.wait()


class Peer:
    """A gateway reduced to its socket."""

    def __init__(self, place: Place) -> None:
        self._processes = place.processes
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(place.endpoint)
        self.ready: wire.Ready | None = None
        self.payloads: list[bytes] = []

    def send(self, message: wire.FromGateway) -> None:
        self._socket.send(wire.encode(message))

    def receive(self, timeout_s: float = 15.0) -> tuple[wire.FromWorker, list[bytes]]:
        if not self._socket.poll(int(timeout_s * 1000)):
            raise TimeoutError("the worker said nothing")
        frames = self._socket.recv_multipart()
        return wire.decode_from_worker(frames[0]), frames[1:]

    def until(
        self, wanted: Callable[[wire.FromWorker], bool], timeout_s: float = 15.0
    ) -> list[wire.FromWorker]:
        """Everything up to and with the first message that is wanted."""
        end_s, seen = time.monotonic() + timeout_s, list[wire.FromWorker]()
        while not seen or not wanted(seen[-1]):
            message, payloads = self.receive(max(0.01, end_s - time.monotonic()))
            seen.append(message)
            if isinstance(message, wire.Ready):
                self.ready, self.payloads = message, payloads
        return seen

    def greet(self) -> wire.Ready:
        """Hello, again and again as a gateway does, until Ready."""

        def greeted() -> wire.Ready | None:
            self.send(wire.Hello(wire.PROTOCOL_VERSION, wire.schema_hash(), "peer"))
            try:
                self.until(lambda message: isinstance(message, wire.Ready), 0.5)
            except TimeoutError:
                return None
            return self.ready

        return wait_until(greeted, "Ready answers Hello", self._processes, timeout_s=30)

    def submit(self, sequence_id: int, **fields: object) -> None:
        assert self.ready is not None
        given = {"prompt": wire.pack_i32(text_ids("hi")), "max_tokens": 5, "ignore_eos": True, **fields}
        submit = wire.Submit(self.ready.epoch, sequence_id, f"r{sequence_id}", **given)  # type: ignore[arg-type]
        self.send(submit)

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


@pytest.fixture
def peer(place: Place) -> Iterator[Peer]:
    peer = Peer(place)
    yield peer
    peer.close()


def ended(sequence_id: int) -> Callable[[wire.FromWorker], bool]:
    return lambda message: (
        (
            isinstance(message, wire.StepOutputs)
            and any(f.sequence_id == sequence_id for f in message.finishes)
        )
        or (isinstance(message, wire.Rejected) and message.sequence_id == sequence_id)
    )


def finish_of(seen: list[wire.FromWorker], sequence_id: int) -> wire.Finish:
    found = [
        finish
        for message in seen
        if isinstance(message, wire.StepOutputs)
        for finish in message.finishes
        if finish.sequence_id == sequence_id
    ]
    assert len(found) == 1
    return found[0]


def test_ready_brings_a_card_and_two_payloads(peer: Peer) -> None:
    ready = peer.greet()
    assert (ready.protocol_version, ready.schema_hash) == (wire.PROTOCOL_VERSION, wire.schema_hash())
    assert len(peer.payloads) == 2 and b'"model"' in peer.payloads[0]
    assert ready.model.vocab_size > 0 and ready.limits.max_rows > 0
    again = peer.greet()
    assert again.epoch == ready.epoch


def test_another_version_is_refused(place: Place, peer: Peer) -> None:
    peer.greet()
    other = Peer(place)
    try:
        other.send(wire.Hello(99, "other", "old"))
        (fatal, *_) = other.until(lambda message: isinstance(message, wire.Fatal))
        assert isinstance(fatal, wire.Fatal) and fatal.code is ErrorCode.VERSION_SKEW
    finally:
        other.close()


def test_tokens_are_numbered_and_the_finish_counts_them(peer: Peer) -> None:
    ready = peer.greet()
    peer.submit(7)
    seen = peer.until(ended(7))
    indexes: list[int] = []
    for message in seen:
        if isinstance(message, wire.StepOutputs):
            assert message.epoch == ready.epoch
            ids, first = wire.unpack_i64(message.sequence_ids), wire.unpack_i32(message.first_index)
            assert len(ids) == len(first) == len(wire.unpack_i32(message.token_ids))
            indexes += [index for sequence_id, index in zip(ids, first, strict=True) if sequence_id == 7]
    finish = finish_of(seen, 7)
    assert indexes == list(range(5))
    assert (finish.reason, finish.prompt_tokens, finish.completion_tokens) == (FinishReason.LENGTH, 2, 5)


def test_a_cancel_is_answered_by_one_finish(peer: Peer) -> None:
    ready = peer.greet()
    peer.submit(8, max_tokens=1500)
    peer.until(lambda message: isinstance(message, wire.StepOutputs) and bool(message.sequence_ids))
    peer.send(wire.Cancel(ready.epoch, [8, 12345]))
    seen = peer.until(ended(8))
    assert finish_of(seen, 8).reason is FinishReason.CANCELLED


def test_a_submit_of_a_dead_epoch_never_runs(peer: Peer) -> None:
    ready = peer.greet()
    stale = wire.Submit(ready.epoch + 1, 9, "r9", wire.pack_i32(text_ids("hi")), 5)
    peer.send(stale)
    peer.submit(10)
    seen = peer.until(ended(10))
    for message in seen:
        if isinstance(message, wire.StepOutputs):
            assert 9 not in wire.unpack_i64(message.sequence_ids)


def test_beats_carry_the_epoch(peer: Peer) -> None:
    ready = peer.greet()
    peer.send(wire.Ping(ready.epoch))
    seen = peer.until(lambda message: isinstance(message, wire.Beat))
    beat = seen[-1]
    assert isinstance(beat, wire.Beat) and beat.epoch == ready.epoch and not beat.draining
    assert msgspec.msgpack.decode(wire.encode(beat))[0] == "Beat"
