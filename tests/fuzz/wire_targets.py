"""Owns the fuzzing of what arrives between gateway and worker, of frames, of settings and of key files."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import msgspec
import zmq
from aiohttp import WebSocketError
from aiohttp.http import WebSocketReader

from degas.settings import resolve
from gateway.config import load
from gateway.core.flights import Flights
from gateway.core.member_lists import _decode as decoded
from gateway.core.member_lists import parse
from gateway.core.placement import Worker
from gateway.core.service import Service
from gateway.core.worker_link import WorkerLink
from gateway.decisions.holdings import Holdings
from gateway.scrape import Scrape
from gateway.transport.guard import FrameGuard
from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from shared.settings import ConfigError, read_file
from tests.fake_worker import CARD, LIMITS, byte_tokenizer
from tests.fuzz.mutations import mutated_bytes
from tests.fuzz.targets import Make, Target, bytes_of
from tests.two_sheets import image_input
from worker.loop.inbox import Inbox, Received
from worker.schedule.intake import build_sequence
from worker.schedule.kv_events import BlockRemoved
from worker.schedule.picture_intake import build_picture
from worker.schedule.refusal import Refusal
from worker.wire.keys import secure_with
from worker.wire.kv_publisher import KvPublisher
from worker.wire.outbox import WireOutbox
from worker.wire.transport import Transport

assert CARD.image is not None
_IMAGE = image_input(1, CARD.image.crop_tokens, CARD.image.crop_size, b"d" * 32)
_FORMAT = wire.FeatureFormat("float16", 2, "w")
_SUBMIT = wire.Submit(1, 7, "r", wire.pack_i32([0, 11, 12, 13]), 8, wire.Sampling(), stop_ids=[1], tenant="t")
_FROM_GATEWAY = (
    wire.Hello(wire.PROTOCOL_VERSION, wire.schema_hash(), "gw"),
    _SUBMIT,
    msgspec.structs.replace(_SUBMIT, images=[_IMAGE], task="detect", max_objects=3),
    msgspec.structs.replace(_SUBMIT, grammar=wire.Grammar("regex", "a+")),
    msgspec.structs.replace(_SUBMIT, images=[_IMAGE], encoded=[0], encoded_as=_FORMAT),
    msgspec.structs.replace(_SUBMIT, thinking=wire.ThinkingBudget(5, [2, 3], [4])),
    msgspec.structs.replace(
        _SUBMIT,
        values=[wire.PromptValue(1, [0.5]), wire.PromptValue(2, [0.25, 0.5])],
        sampling=wire.Sampling(num_prompt_logprobs=2),
    ),
    wire.Encode(1, 9, _IMAGE, "t"),
    wire.Cancel(1, [7]),
    wire.Ping(1, 2.0),
    wire.Drain(1.0),
    wire.Trace(5),
)
_FROM_WORKER = (
    wire.Ready(wire.PROTOCOL_VERSION, wire.schema_hash(), 1, CARD, LIMITS, "cpu"),
    wire.Ready(
        wire.PROTOCOL_VERSION, wire.schema_hash(), 1, CARD, LIMITS, "cpu", {"load": 1.0}, role="encode", features=_FORMAT
    ),
    wire.StepOutputs(
        1, 3, wire.pack_i64([7]), wire.pack_i32([0]), wire.pack_i32([11]),
        [wire.Finish(7, FinishReason.STOP, 4, 1)], [wire.TokenValues(7, 0, [0.5])],
        [wire.TokenLogprobs(7, 0, -0.5, wire.pack_i32([11, 12]), [-0.5, -1.0])],
        [wire.PromptLogprobs(7, 1, bytes(8), wire.pack_i32([1, 2]), wire.pack_i32([4, 5, 6, 7]), bytes(16))],
    ),
    wire.Rejected(1, 7, ErrorCode.QUEUE_FULL, "full", "", 1.0),
    wire.Features(1, 9, _FORMAT),
    wire.Features(1, 9, None, ErrorCode.QUEUE_FULL, "full"),
    wire.Fatal(1, ErrorCode.DEVICE_ERROR, "lost"),
    wire.Beat(1, 3, 1, 0, 5, 9, metrics={"a_total": 1.0, "b|c": 2.0}, histograms={"h": [1.0] * 19}),
    wire.TraceChunk(1, 5),
)  # fmt: skip


def _messages(sound: tuple[wire.Message, ...]) -> Make:
    """Encoded messages with damaged bytes, or with one field of another kind."""
    plain = [msgspec.msgpack.decode(wire.encode(message)) for message in sound]
    whole = [wire.encode(message) for message in sound]

    def make(rng: random.Random, donors: list[Any]) -> bytes:
        if rng.random() < 0.5:
            return mutated_bytes(rng.choice(whole), rng, whole)
        fields = list(rng.choice(plain))
        for _ in range(rng.randint(1, 3)):
            odd = (*_ODD, *donors)
            fields[rng.randrange(len(fields))] = rng.choice(odd)
        try:
            return msgspec.msgpack.encode(fields)
        except (OverflowError, UnicodeEncodeError, TypeError):
            return rng.choice(whole)

    return make


_ODD: tuple[Any, ...] = (
    None, -1, 0, 1, 2**31, 2**53, 2**63 - 1, -(2**63), float("nan"), float("inf"), -0.0, "", "a" * 300, "\0", b"", b"\1\2\3",
    b"\xff" * 8, [], [[]], {}, {"a": 1}, [1] * 300, True,
)  # fmt: skip


class _Peer:
    """A socket that swallows."""

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> None:
        """Take it."""


@cache  # kept for good: a ZeroMQ context that is collected waits for its sockets
def worker_side() -> Callable[[bytes], object]:
    """A frame as a worker's I/O thread takes it, and what it lets in as the decode thread takes that."""
    inbox: Inbox = SimpleQueue()
    transport = Transport("ipc://unused", inbox, WireOutbox())
    transport.announce(
        wire.Ready(wire.PROTOCOL_VERSION, wire.schema_hash(), 1, CARD, LIMITS, "cpu"), [b"", b""]
    )
    socket = cast("zmq.Socket[bytes]", _Peer())
    hello = wire.encode(_FROM_GATEWAY[0])
    pixels = [bytes(28 * 28 * 3), bytes(28 * 28 * 3)]

    def call(data: bytes) -> None:
        transport._on_frames(socket, [b"g", hello])
        transport._on_frames(socket, [b"g", data, *pixels])
        transport._on_frames(socket, [b"g", data])
        while not inbox.empty():
            taken = inbox.get()
            message = taken.message if isinstance(taken, Received) else None
            try:
                if isinstance(taken, Received) and isinstance(message, wire.Submit):
                    build_sequence(taken.gateway, message, list(taken.frames), CARD, 0.0, None, _FORMAT)
                elif isinstance(taken, Received) and isinstance(message, wire.Encode):
                    build_picture(message, taken.frames, CARD)
            except Refusal:
                continue

    return call


class _GatewaySide:
    """A frame as a gateway takes it of a worker that serves; afterwards the metrics must still be readable."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._service = Service(load({}))
        self._scrape = Scrape(self._service)
        self._ready = wire.encode(_FROM_WORKER[0])
        self._tokenizer = byte_tokenizer().to_str().encode()
        self._num = 0
        self._renew()

    def _renew(self) -> None:
        service = self._service
        self.link = WorkerLink("ipc://unused", service, service._context, gateway_id="g")
        flights = Flights(service._dispatch, self.link.note, service._now)
        worker = Worker(0, self.link, flights, service._admission.occupancy(0, 0))
        service._workers[:] = [worker]
        service._placement.by_key[0] = worker
        service._pool._by_link = {self.link: worker}
        self.link.note = lambda kind, **fields: None  # type: ignore[method-assign]  # counted and logged in a real one
        self.link.on_frames([self._ready, self._tokenizer, b""])

    def __call__(self, data: bytes) -> None:
        if self.link.ready is None:
            self._renew()
        try:
            self.link.on_frames([data, self._tokenizer, b""])
        finally:
            self._num += 1
            if self._num % 64 == 0:
                self._scrape.render()


class _Router:
    """A socket of readers of KV events: what they ask, then nothing more."""

    def __init__(self) -> None:
        self.asked: list[list[bytes]] = []

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self.asked:
            raise zmq.Again
        return self.asked.pop()

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        """Take it."""


class _Replays:
    """Readers' requests for the events that a worker holds: a frame each, apart by newlines."""

    def __init__(self) -> None:
        self._router = _Router()
        self._publisher = KvPublisher("ipc://unused", "ipc://unused", max_held=3)
        self._publisher._publish_socket = self._publisher.replay = cast("zmq.Socket[bytes]", self._router)
        for number in range(5):
            self._publisher.publish([BlockRemoved([number])])

    def __call__(self, data: bytes) -> None:
        self._router.asked = [[b"r", *data.split(b"\n")]]
        self._publisher.turn(list, has_requests=True)
        while self._publisher.is_replaying:
            self._publisher.turn(list, has_requests=False)


class _Transport:
    def pause_reading(self) -> None:
        """Nothing to pause."""

    def resume_reading(self) -> None:
        """Nothing to resume."""


class _Reader:
    def feed_data(self, data: bytes) -> None:
        """Read and forget."""

    def feed_eof(self) -> None:
        """Nothing follows."""


def _frames(data: bytes) -> object:
    """A client's WebSocket bytes, in two pieces, locked and unlocked. The guard keeps its faults to itself."""
    for unlocks in (False, True):
        guard = FrameGuard(cast(WebSocketReader, _Reader()), cast(asyncio.Transport, _Transport()))
        if unlocks:
            guard.unlock(1 << 20, Holdings(1 << 20).holding("t"))
        half = len(data) // 2
        guard.feed_data(data[:half])
        guard.feed_data(data[half:])
        guard.attach(lambda fault: None)
        guard.feed_eof()
    return None


class _Files:
    """Settings and keys as files, in a folder of their own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="degas-fuzz-")
        self.path = Path(self._folder.name)

    def toml(self, data: bytes) -> object:
        """A file of settings, read and checked as `degas serve` does."""
        file = self.path / "degas.toml"
        file.write_bytes(data)
        read_file(file, {})
        return resolve({}, {}, file)

    def keys(self, data: bytes) -> object:
        """A worker's secret key file."""
        (self.path / "worker.key_secret").write_bytes(data)
        return secure_with(str(self.path))


_TOML = (
    b'[worker]\nmodel = "pocket"\nmax_rows = 16\nthreads = 1\nprice_per_hour = 1.5\n',
    b'[gateway]\nworkers = ["ipc:///tmp/w"]\napi_keys = ["k-123456789"]\nmodel_aliases = {a = "b"}\nmax_body_bytes = "24MiB"\n'
    b'cors_origins = ["https://*.app.example"]\npublic = ["metrics"]\n',
    b"[serve]\npreload = false\nport = 0\n",
)
_KEY = b'metadata\n    a = "b"\ncurve\n    public-key = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"\n    secret-key = "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"\n'
_LIST = b"# workers\ntcp://10.0.0.1:5555\n\n tcp://[::1]:5556\ntcp://worker-0.workers.svc:5557\r\n"
_WS = (
    b"\x81\x85\0\0\0\0hello",
    b"\x01\x82\0\0\0\0ab\x80\x81\0\0\0\0c",
    b"\x88\x82\0\0\0\0\x03\xe8",
    b"\x81\xfe\x01\x00\0\0\0\0" + b"x" * 256,
)


@cache
def wire_targets() -> list[Target]:
    """Both ends of the wire, frames of clients, files."""
    files = _Files()
    return [
        Target("wire-worker", _messages(_FROM_GATEWAY), worker_side(), ()),
        Target("wire-gateway", _messages(_FROM_WORKER), _GatewaySide(), wire.NO_MESSAGE),
        Target("websocket", bytes_of(_WS), _frames, (WebSocketError,)),
        Target("kv-replays", bytes_of((b"\n" + bytes(8), b"\n" + b"\xff" * 8)), _Replays(), ()),
        Target("worker-lists", bytes_of((_LIST,)), lambda data: parse(decoded(data)), (ValueError,)),
        Target("toml", bytes_of(_TOML), files.toml, (ConfigError,)),
        Target("keys", bytes_of((_KEY,)), files.keys, (ConfigError,)),
    ]
