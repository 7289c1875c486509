"""A worker's conversation with one prefill worker, move by move: what is sent, what is told, and what nothing comes of."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import pytest

from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.unit.worker.loop.simulation import CARD
from worker.loop.inbox import Command, PagesHere, PrefillEnded, PrefillJob
from worker.wire.prefill_peer import CONNECT_S, HELLO_S, PING_S, REFUSED_HELLO_S, PeerState, PrefillPeer

FORMAT = wire.PageFormat("bfloat16", 4, "2 layers", 32, "abc")
LIMITS = wire.Limits(4, 8, 64, 4, 64, 128, 3.0)
EPOCH = 9


class Conversation:
    """A peer, what it sent, what the decode thread was told, and the time."""

    def __init__(self) -> None:
        self.now_s = 10.0
        self.frames: list[list[bytes]] = []
        self.told: list[Command] = []
        self.takes = True
        self.peer = PrefillPeer("tcp://p:1", FORMAT, "w", self._send, self.told.append, self.now_s)

    def _send(self, frames: list[bytes]) -> bool:
        if self.takes:
            self.frames.append(frames)
        return self.takes

    def sent(self) -> list[wire.FromGateway]:
        """What it sent since the last call."""
        frames, self.frames = self.frames, []
        return [wire.decode_from_gateway(one[0]) for one in frames]

    def hear(self, message: wire.FromWorker, *payloads: bytes) -> None:
        self.peer.on_frames([wire.encode(message), *payloads], self.now_s)

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        self.peer.on_time(self.now_s)

    def ready(self, epoch: int = EPOCH, **changed: Any) -> None:
        ready = wire.Ready(
            wire.PROTOCOL_VERSION,
            wire.schema_hash(),
            epoch,
            CARD,
            LIMITS,
            "cpu",
            role="prefill",
            pages=FORMAT,
        )
        self.hear(msgspec.structs.replace(ready, **changed))

    def ask(self, job_id: int = 1) -> None:
        self.peer.ask(PrefillJob(job_id, "tcp://p:1", b"", 2, 5, "t", 3, 7.0), self.now_s)

    def ends(self) -> list[tuple[int, str]]:
        return [(one.job_id, one.outcome) for one in self.told if isinstance(one, PrefillEnded)]


@pytest.fixture
def talk() -> Conversation:
    made = Conversation()
    made.ready()
    made.sent()
    return made


def beat(expected_s: float = 0.0) -> wire.Beat:
    return wire.Beat(EPOCH, 1, 0, 0, 8, 8, expected_s=expected_s)


def finished(job_id: int, reason: FinishReason, code: ErrorCode | None = None) -> wire.StepOutputs:
    return wire.StepOutputs(EPOCH, 1, b"", b"", b"", [wire.Finish(job_id, reason, 4, 1, 0, code, "why")])


def test_hello_until_it_answers_then_what_waited_is_asked() -> None:
    talk = Conversation()
    talk.pass_s(0.0)
    talk.pass_s(HELLO_S / 2)
    talk.ask()
    talk.pass_s(HELLO_S / 2)
    assert [type(message) for message in talk.sent()] == [wire.Hello, wire.Hello]
    talk.ready()
    assert talk.sent() == [wire.Prefill(EPOCH, 1, b"", 2, "t", 3, 7.0)]
    talk.ready()
    assert not talk.sent() and talk.peer.state is PeerState.READY


def test_a_peer_that_never_answers_costs_one_prompt_a_moment_and_the_next_none() -> None:
    talk = Conversation()
    talk.ask(1)
    talk.pass_s(CONNECT_S)
    talk.ask(2)
    assert talk.ends() == [(1, "lost"), (2, "lost")] and talk.peer.num_jobs == 0
    talk.ready()
    talk.ask(3)
    assert talk.peer.num_jobs == 1


def test_pages_are_handed_on_as_they_came_and_the_end_is_told_once(talk: Conversation) -> None:
    talk.ask()
    data = bytes(range(64))
    talk.hear(wire.Pages(EPOCH, 1, 2, b"k" * 32, zlib.crc32(data)), data)
    talk.hear(finished(1, FinishReason.LENGTH))
    talk.hear(finished(1, FinishReason.LENGTH))
    page, end = talk.told
    assert isinstance(page, PagesHere) and (page.job_id, page.first, bytes(page.data)) == (1, 2, data)
    assert end == PrefillEnded(1, "done")


@pytest.mark.parametrize("payloads", [[], [b"x"], [bytes(64), bytes(64)]])
def test_a_frame_that_is_missing_or_changed_ends_the_prompt(
    talk: Conversation, payloads: list[bytes]
) -> None:
    talk.ask()
    talk.sent()
    talk.hear(wire.Pages(EPOCH, 1, 2, b"k" * 32, zlib.crc32(b"y")), *payloads)
    assert talk.ends() == [(1, "malformed")] and talk.sent() == [wire.Cancel(EPOCH, [1])]


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        (finished(1, FinishReason.ERROR, ErrorCode.NUMERICAL_ERROR), "failed"),
        (finished(1, FinishReason.DEADLINE), "failed"),
        (wire.Rejected(EPOCH, 1, ErrorCode.QUEUE_FULL, "full"), "refused"),
        (wire.Fatal(EPOCH, ErrorCode.DEVICE_ERROR, "x"), "lost"),
    ],
)
def test_every_way_to_say_no(talk: Conversation, message: wire.FromWorker, outcome: str) -> None:
    talk.ask()
    talk.hear(message)
    assert talk.ends() == [(1, outcome)]


def test_slow_is_not_silent_and_silence_is_a_loss(talk: Conversation) -> None:
    talk.ask()
    talk.hear(beat(expected_s=10.0))
    talk.pass_s(12.0)
    assert not talk.ends() and talk.sent()[-1] == wire.Ping(EPOCH, talk.now_s)
    talk.pass_s(1.1)
    assert talk.ends() == [(1, "lost")] and talk.peer.state is PeerState.DOWN
    talk.ready()  # the same process again
    assert talk.sent() == [wire.Cancel(EPOCH, [1])]


def test_a_lease_is_kept_by_pings(talk: Conversation) -> None:
    talk.pass_s(PING_S / 2)
    assert not talk.sent()
    talk.hear(beat())
    talk.pass_s(PING_S)
    assert [type(message) for message in talk.sent()] == [wire.Ping]


def test_a_new_epoch_ends_what_the_old_one_was_asked_and_its_frames_mean_nothing(talk: Conversation) -> None:
    talk.ask(1)
    talk.ready(epoch=EPOCH + 1)
    talk.ask(2)
    talk.hear(finished(2, FinishReason.LENGTH))  # of the old epoch
    assert talk.ends() == [(1, "lost")]


def test_a_cancelled_prompt_ends_without_a_word(talk: Conversation) -> None:
    talk.ask()
    talk.sent()
    talk.peer.cancel(1)
    talk.peer.cancel(1)
    talk.hear(wire.Pages(EPOCH, 1, 2, b"k" * 16, 0), b"")
    talk.hear(finished(1, FinishReason.CANCELLED))
    assert talk.sent() == [wire.Cancel(EPOCH, [1])] and not talk.told


def test_a_full_socket_is_a_loss_of_that_prompt(talk: Conversation) -> None:
    talk.takes = False
    talk.ask()
    assert talk.ends() == [(1, "lost")]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"role": "all"}, "a safe value is prefill"),
        ({"pages": None}, "role"),
        ({"schema_hash": "x"}, "the same version"),
        *[
            ({"pages": msgspec.structs.replace(FORMAT, **{name: value})}, says)
            for name, value, says in (
                ("dtype", "float32", "kv_dtype"),
                ("page_tokens", 8, "page_tokens"),
                ("layout", "3 layers", "layout"),
                ("page_bytes", 64, "page_bytes"),
                ("weights", "abd", "quantize"),
            )
        ],
    ],
)
def test_pages_of_another_kind_are_refused_with_what_differs(changed: dict[str, Any], says: str) -> None:
    talk = Conversation()
    talk.ask(1)
    talk.ready(**changed)
    talk.ask(2)
    assert talk.ends() == [(1, "mismatched"), (2, "mismatched")]
    (first, _) = (one for one in talk.told if isinstance(one, PrefillEnded))
    assert says in first.detail
    talk.pass_s(0.0)
    talk.sent()
    talk.pass_s(REFUSED_HELLO_S - 0.1)
    assert not talk.sent(), "it is asked again, seldom"
    talk.pass_s(0.2)
    assert [type(message) for message in talk.sent()] == [wire.Hello]
    talk.ready(epoch=EPOCH + 1)
    talk.ask(3)
    assert talk.peer.num_jobs == 1


def test_noise_is_passed_over(talk: Conversation) -> None:
    talk.ask()
    for frames in ([], [b""], [b"\xc1"], [wire.encode(wire.TraceChunk(EPOCH, 1))]):
        talk.peer.on_frames(frames, talk.now_s)
    assert talk.peer.num_jobs == 1 and not talk.told
