"""The loop of a worker that only encodes: what it takes, what it refuses and how, and its signs of life."""

from __future__ import annotations

from dataclasses import dataclass, field
from queue import SimpleQueue

import pytest

from shared.errors import ErrorCode
from shared.protocol import (
    Beat,
    Cancel,
    Drain,
    Encode,
    Fatal,
    Features,
    FromWorker,
    Rejected,
    Submit,
    pack_i32,
)
from tests.two_sheets import image_input
from tests.unit.worker.loop.simulation import CARD, EPOCH, GATEWAY
from worker.loop.encoding import EncodeLoop
from worker.loop.inbox import Inbox, LeaseEnded, Received
from worker.schedule.sequence import Picture
from worker.sim.encoder import SIM_FEATURES, SimEncoder
from worker.sim.profiles import TEST
from worker.sim.timeline import VirtualClock
from worker.step.contract import OutOfDeviceMemory, Progress

PIXELS = [bytes(192), bytes(192)]


@dataclass
class Sent:
    """An outbox that keeps everything."""

    messages: list[tuple[bytes | None, FromWorker, list[bytes]]] = field(default_factory=list)

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        self.messages.append((gateway, message, payloads or []))

    def broadcast(self, message: FromWorker) -> None:
        self.messages.append((None, message, []))

    def features(self) -> list[Features]:
        return [message for _, message, _ in self.messages if isinstance(message, Features)]

    def beats(self) -> list[Beat]:
        return [message for _, message, _ in self.messages if isinstance(message, Beat)]


class World:
    def __init__(self, max_jobs: int = 4) -> None:
        self.clock = VirtualClock()
        self.inbox: Inbox = SimpleQueue()
        self.outbox = Sent()
        self.encoder = SimEncoder(self.clock, TEST)
        self.loop = EncodeLoop(
            self.encoder,
            CARD,
            inbox=self.inbox,
            outbox=self.outbox,
            clock=self.clock.now,
            epoch=EPOCH,
            max_jobs=max_jobs,
        )

    def ask(
        self, job_id: int, *, epoch: int = EPOCH, frames: list[bytes] = PIXELS, gateway: bytes = GATEWAY
    ) -> None:
        image = image_input(1, 9, 8, bytes([job_id]) * 32)
        self.inbox.put(Received(gateway, Encode(epoch, job_id, image), frames))

    def run(self) -> list[tuple[int, ErrorCode | None]]:
        while self.loop.tick():
            pass
        return [(message.job_id, message.code) for message in self.outbox.features()]


def test_features_are_one_frame_in_the_format_that_was_announced() -> None:
    world = World()
    world.ask(1)
    assert world.run() == [(1, None)]
    gateway, message, frames = world.outbox.messages[-1]
    assert gateway == GATEWAY and isinstance(message, Features) and message.format == SIM_FEATURES
    assert [len(frame) for frame in frames] == [9 * 8]
    assert world.clock.now() == pytest.approx(2 * TEST.crop_s)


def test_what_is_refused_says_why_and_nothing_else_suffers() -> None:
    world = World(max_jobs=2)
    world.ask(1, epoch=EPOCH - 1)
    world.ask(2, frames=PIXELS[:1])
    world.ask(3)
    world.ask(3)  # a frame delivered twice
    world.ask(4)
    world.ask(5)
    assert world.run() == [
        (1, ErrorCode.WORKER_LOST),
        (2, ErrorCode.INVALID_REQUEST),
        (5, ErrorCode.QUEUE_FULL),
        (3, None),
        (4, None),
    ]
    submit = Submit(EPOCH, 9, "r", pack_i32([30]), 1)
    world.inbox.put(Received(GATEWAY, submit))
    world.run()
    answer = world.outbox.messages[-1][1]
    assert isinstance(answer, Rejected) and answer.code is ErrorCode.UNSUPPORTED


def test_cancelled_pictures_and_those_of_a_gateway_that_is_gone_are_not_encoded() -> None:
    world = World()
    world.ask(1)
    world.ask(2)
    world.ask(3, gateway=b"gone")
    world.inbox.put(Received(GATEWAY, Cancel(EPOCH, [1, 77])))
    world.inbox.put(LeaseEnded(b"gone"))
    assert world.run() == [(2, None)]


def test_a_drain_finishes_what_is_there_within_its_deadline() -> None:
    world = World()
    for job_id in (1, 2, 3):
        world.ask(job_id)
    world.inbox.put(Received(b"", Drain(1.5 * 2 * TEST.crop_s)))
    world.ask(4)
    assert world.run() == [
        (4, ErrorCode.SHUTTING_DOWN),
        (1, None),
        (2, None),
        (3, ErrorCode.SHUTTING_DOWN),
    ]
    assert world.loop.is_done


def test_long_pictures_are_announced_and_beats_come_from_inside_them() -> None:
    world = World()
    world.ask(1)

    def slow(tenant: str, picture: Picture, progress: Progress) -> bytes:
        for _ in range(8):
            world.clock.advance(0.3)
            progress()
        return bytes(72)

    world.encoder.encode = slow  # type: ignore[method-assign]
    world.run()
    beats = world.outbox.beats()
    assert beats[1].expected_s == pytest.approx(4.0) and beats[1].num_running == 1
    assert len(beats) >= 5
    world.clock.advance(1.0)
    world.run()
    last = world.outbox.beats()[-1]
    assert (last.num_running, last.num_waiting, last.expected_s) == (0, 0, 0.0)
    assert last.metrics["encoded_pictures_total"] == 1 and last.metrics["encoded_crops_total"] == 2
    assert last.metrics["feature_bytes_sent_total"] == 72


def test_no_memory_costs_that_picture_and_a_lost_device_tells_everybody() -> None:
    world = World()
    encode = world.encoder.encode

    def fails(tenant: str, picture: Picture, progress: Progress) -> bytes:
        if picture.digest[0] == 1:
            raise OutOfDeviceMemory("full")
        if picture.digest[0] == 3:
            raise RuntimeError("illegal address")
        return encode(tenant, picture, progress)

    world.encoder.encode = fails  # type: ignore[method-assign]
    world.ask(1)
    world.ask(2)
    assert world.run() == [(1, ErrorCode.OUT_OF_MEMORY), (2, None)]
    world.ask(3)
    with pytest.raises(RuntimeError, match="illegal"):
        world.loop.run()
    last = world.outbox.messages[-1]
    assert last[0] is None and isinstance(last[1], Fatal)
