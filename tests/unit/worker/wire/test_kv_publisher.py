"""Published KV events by example and under random histories: read by a reader of their own, missed and asked for again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.worker.schedule.examples import sequence
from tests.unit.worker.wire.plain_msgpack import read
from tests.unit.worker.wire.router_view import RouterView
from worker.schedule.kv_events import BlockRemoved, BlockStored, KvEvent, KvEvents, hash_of
from worker.schedule.pages import PagePool
from worker.schedule.prefix_cache import PrefixCache
from worker.schedule.sequence import IMAGE_TOKEN, Picture, Run
from worker.wire import kv_publisher
from worker.wire.kv_publisher import CannotPublish, Form, KvPublisher

PROMPT = list(range(20, 31))  # two full pages of four, and three tokens
TOPIC = "kv@10.0.0.7@pocket"
END = b"\xff" * 8


class Publishing:
    """A publisher in this thread, and readers that connect to it."""

    def __init__(self, folder: Path, form: Form = "arrays", **options: Any) -> None:
        self.address, self.replay_address = f"ipc://{folder}/kv", f"ipc://{folder}/replay"
        self.publisher = KvPublisher(self.address, self.replay_address, TOPIC, form, **options)
        self.publisher.open()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets: list[zmq.Socket[bytes]] = []

    def connect(self, kind: int, address: str, **options: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        self.sockets.append(socket)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        for name, value in options.items():
            socket.setsockopt(getattr(zmq, name.upper()), value)
        socket.connect(address)
        return socket

    def subscribe(self, topic: bytes = b"kv@", **options: int) -> zmq.Socket[bytes]:
        """A subscriber that is known to the publisher: it has got a message. Numbers before that are lost on it."""
        socket = self.connect(zmq.SUB, self.address, **options)
        socket.setsockopt(zmq.SUBSCRIBE, topic)
        socket.setsockopt(zmq.RCVTIMEO, 20)
        for _ in range(250):
            self.publisher.publish([BlockRemoved([1])])
            try:
                socket.recv_multipart()
            except zmq.Again:
                continue
            socket.setsockopt(zmq.RCVTIMEO, 5000)
            return socket
        raise AssertionError("the subscriber heard nothing")

    def replay(self, first: int, reader: zmq.Socket[bytes] | None = None) -> list[tuple[int, bytes]]:
        """Ask for messages from `first` on, and read to the end."""
        reader = reader or self.connect(zmq.DEALER, self.replay_address)
        reader.send_multipart([b"", first.to_bytes(8, "big")])
        found: list[tuple[int, bytes]] = []
        while True:
            while not reader.poll(2):
                self.publisher.turn(list, has_requests=True)
            empty, number, payload = reader.recv_multipart()
            assert empty == b""
            if number == END:
                assert payload == b""
                return found
            found.append((int.from_bytes(number, "big"), payload))

    def close(self) -> None:
        for socket in self.sockets:
            socket.close(0)
        self.context.term()
        self.publisher.close()


@pytest.fixture
def publishing(tmp_path: Path) -> Iterator[Publishing]:
    made = Publishing(tmp_path)
    yield made
    made.close()


class Cached:
    """A prefix cache that tells what it does."""

    def __init__(self, num_pages: int = 20) -> None:
        self.pool = PagePool(num_pages, 4)
        self.cache = PrefixCache(self.pool, KvEvents())

    def remember(self, tokens: list[int], **fields: Any) -> None:
        seq = sequence(tokens, **fields)
        seq.pages = [self.pool.take() for _ in range(self.pool.pages_for(len(tokens)))]
        self.cache.insert(seq, len(tokens))
        self.cache.release(seq)


def test_a_prompts_pages_are_one_event_and_evicted_ones_another(publishing: Publishing) -> None:
    cached, view = Cached(), RouterView()
    reader = publishing.subscribe()
    cached.remember(PROMPT)
    publishing.publisher.publish(cached.cache.take_events())
    topic, number, payload = reader.recv_multipart()
    assert topic == TOPIC.encode() and len(number) == 8
    batch: Any = read(payload)
    cleared, stored = batch[1]
    assert cleared == ["AllBlocksCleared"]
    assert stored[0] == "BlockStored" and stored[2:] == [None, PROMPT[:8], 4, None, "GPU", None]
    view.on_payload(payload)
    assert view.prefix_of([*PROMPT, 1, 2], 4) == 8 and view.prefix_of([1, *PROMPT], 4) == 0

    cached.remember([*PROMPT[:8], 90, 91, 92, 93])  # one page more, behind the two
    publishing.publisher.publish(cached.cache.take_events())
    _, after, payload = reader.recv_multipart()
    assert int.from_bytes(after, "big") == int.from_bytes(number, "big") + 1
    view.on_payload(payload)
    assert view.prefix_of([*PROMPT[:8], 90, 91, 92, 93], 4) == 12

    cached.cache.evict(1)
    publishing.publisher.publish(cached.cache.take_events())
    view.on_payload(reader.recv_multipart()[2])
    assert set(view.tokens) == {hash_of(key) for key in cached.cache.keys} and len(view.tokens) == 2


@pytest.mark.parametrize("form", ["arrays", "maps"])
def test_what_else_a_hash_covers_is_said_for_each_block(tmp_path: Path, form: Form) -> None:
    publishing = Publishing(tmp_path, form)
    try:
        cached, view = Cached(), RouterView()
        picture = Picture((Run(1, 5, 0),), [], [], b"\xab\xcd")
        cached.remember([20, *[IMAGE_TOKEN] * 5, *range(40, 47)], tenant="acme", pictures=[picture])
        reader = publishing.subscribe()
        publishing.publisher.publish(cached.cache.take_events())
        payload = reader.recv_multipart()[2]
        is_map = isinstance(read(payload)[1][1], dict)  # type: ignore[index]
        assert is_map is (form == "maps")
        view.on_payload(payload)
        assert list(view.tokens.values()) == [(20, 0, 0, 0), (0, 0, 40, 41), (42, 43, 44, 45)]
        first, second, third = view.extra.values()
        assert second == ["abcd"] and third is None
        assert first is not None and first[0] == "abcd" and len(first) == 2, "the tenant's salt"
        assert "acme" not in first[1]
    finally:
        publishing.close()


def test_a_router_that_missed_messages_asks_for_them_again(publishing: Publishing) -> None:
    cached = Cached()
    for start in range(0, 40, 4):
        cached.remember(list(range(start, start + 4)))
        publishing.publisher.publish(cached.cache.take_events())
    view = RouterView()
    for number, payload in publishing.replay(0):
        assert number == len(view.times)
        view.on_payload(payload)
    assert set(view.tokens) == {hash_of(key) for key in cached.cache.keys} and len(view.times) == 10
    assert [number for number, _ in publishing.replay(7)] == [7, 8, 9]
    assert publishing.replay(10) == [] and publishing.replay((1 << 64) - 1) == []


def test_only_the_last_messages_are_held(tmp_path: Path) -> None:
    publishing = Publishing(tmp_path, max_held=5)
    try:
        for number in range(12):
            publishing.publisher.publish([BlockRemoved([number])])
        assert [number for number, _ in publishing.replay(0)] == [7, 8, 9, 10, 11]
    finally:
        publishing.close()


def test_held_messages_are_bounded_in_bytes(publishing: Publishing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_publisher, "MAX_HELD_BYTES", 1000)
    for _ in range(40):
        publishing.publisher.publish([BlockRemoved(list(range(1 << 63, (1 << 63) + 20)))])
    held = publishing.replay(0)
    assert len(held) == 4 and sum(len(payload) for _, payload in held) <= 1000


@pytest.mark.parametrize(
    "frames", [[], [b"x"], [b"", b""], [b"", b"1234567"], [b"x", b"12345678"], [b"", b"12345678", b""]]
)
def test_a_request_of_another_form_is_counted_and_harms_nobody(
    publishing: Publishing, frames: list[bytes]
) -> None:
    publishing.publisher.publish([BlockRemoved([1])])
    reader = publishing.connect(zmq.DEALER, publishing.replay_address)
    reader.send_multipart(frames or [b""])
    assert len(publishing.replay(0)) == 1
    while not publishing.publisher.num_bad_requests:
        publishing.publisher.turn(list, has_requests=True)
    assert publishing.publisher.num_bad_requests == 1


@pytest.mark.slow
def test_a_subscriber_that_reads_nothing_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queue fills and it loses messages. Everybody else, and the publishing thread, go on; it learns what it lost."""
    monkeypatch.setattr(kv_publisher, "HWM", 500)
    publishing = Publishing(tmp_path)
    try:
        asleep = publishing.subscribe(rcvhwm=4)
        awake = publishing.subscribe()
        while asleep.poll(0):
            asleep.recv_multipart()
        long_event: list[KvEvent] = [BlockStored([1], None, list(range(3000)), 3000, [None])]
        sent: list[int] = []
        for _ in range(1500):
            publishing.publisher.publish(long_event)
            number = int.from_bytes(awake.recv_multipart()[1], "big")
            assert not sent or number == sent[-1] + 1, "the one that reads gets all"
            sent.append(number)
        heard = []
        while asleep.poll(200):
            heard.append(int.from_bytes(asleep.recv_multipart()[1], "big"))
        assert heard == sent[: len(heard)] and len(heard) < len(sent), "it was not waited for"
        publishing.publisher.publish(long_event)
        assert int.from_bytes(asleep.recv_multipart()[1], "big") == sent[-1] + 1, "and hears what comes next"
        lost = [number for number, _ in publishing.replay(heard[-1] + 1)]
        assert lost == [*sent[len(heard) :], sent[-1] + 1]
    finally:
        publishing.close()


@pytest.mark.slow
def test_a_replay_goes_on_as_its_reader_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader with a short queue asks for everything: pieces, with others served between them, and nothing lost."""
    monkeypatch.setattr(kv_publisher, "HWM", 8)
    publishing = Publishing(tmp_path)
    try:
        for number in range(2000):
            publishing.publisher.publish([BlockRemoved(list(range(number, number + 200)))])
        slow = publishing.connect(zmq.DEALER, publishing.replay_address, rcvhwm=4)
        slow.send_multipart([b"", (0).to_bytes(8, "big")])
        while not publishing.publisher.is_replaying:
            publishing.publisher.turn(list, has_requests=True)
        for _ in range(100):  # it reads nothing
            publishing.publisher.turn(list, has_requests=False)
        assert publishing.publisher.is_replaying
        assert len(publishing.replay(1900)) == 100, "another one is served meanwhile"
        numbers = []
        while True:
            while not slow.poll(2):
                publishing.publisher.turn(list, has_requests=False)
            _, number_bytes, _ = slow.recv_multipart()
            if number_bytes == END:
                break
            numbers.append(int.from_bytes(number_bytes, "big"))
        assert numbers == list(range(2000))
        assert not publishing.publisher.is_replaying
    finally:
        publishing.close()


def test_a_reader_that_leaves_ends_its_replay_and_too_many_replace_the_oldest(publishing: Publishing) -> None:
    publishing.publisher.publish([BlockRemoved([1])])
    gone = publishing.connect(zmq.DEALER, publishing.replay_address)
    gone.send_multipart([b"", bytes(8)])
    publisher = publishing.publisher
    assert publisher.replay is not None
    publisher.replay.poll(5000)
    publisher._read_requests(publisher.replay)
    for number in range(kv_publisher.MAX_REPLAYS):  # nobody of that name is there
        publisher._replays[bytes([number])] = kv_publisher._Replay(bytes([number]), 0)
    assert len(publishing.replay(0)) == 1
    assert not publisher.is_replaying


@pytest.mark.parametrize("setting", ["kv_events", "kv_events_replay"])
def test_an_address_that_is_taken_is_named_with_its_setting(tmp_path: Path, setting: str) -> None:
    (tmp_path / "folder").mkdir()
    good, bad = f"ipc://{tmp_path}/a", f"ipc://{tmp_path}/nowhere/b"
    publisher = KvPublisher(*((bad, good) if setting == "kv_events" else (good, bad)))
    with pytest.raises(CannotPublish, match=rf"cannot bind {setting} .*/nowhere/b"):
        publisher.open()
    publisher.close()


Steps = st.lists(
    st.tuples(
        st.sampled_from(["remember", "remember", "evict", "forget"]),
        st.lists(st.integers(0, 2), min_size=1, max_size=18),
        st.sampled_from(["", "a"]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps=Steps, form=st.sampled_from(["arrays", "maps"]))
def test_events_alone_tell_what_is_cached(steps: list[tuple[str, list[int], str]], form: Form) -> None:
    """A reader of payloads knows at every moment the very blocks that the cache holds, tokens and parents included."""
    cached, view = Cached(num_pages=8), RouterView()
    payloads: list[bytes] = []
    publisher = KvPublisher("ipc://unused", None, "", form, now=itertools.count(1.0).__next__)
    publisher._publish_socket = _Sink(payloads)  # type: ignore[assignment]
    for kind, tokens, tenant in steps:
        short = cached.pool.pages_for(len(tokens)) - cached.pool.num_free
        if short > 0:
            cached.cache.evict(short)
        seq = sequence(tokens, tenant=tenant)
        if kind == "evict":
            cached.cache.evict(len(tokens))
        else:
            cached.cache.match(seq)
            while len(seq.pages) < cached.pool.pages_for(len(tokens)) and cached.pool.num_free:
                seq.pages.append(cached.pool.take())
            cached.cache.insert(seq, min(len(tokens), 4 * len(seq.pages)))
            if kind == "forget":
                cached.cache.forget(seq)
            cached.cache.release(seq)
        if events := cached.cache.take_events():
            publisher.publish(events)
            view.on_payload(payloads[-1])
        assert set(view.tokens) == {hash_of(key) for key in cached.cache.keys}


@settings(max_examples=300, deadline=None)
@given(
    requests=st.lists(st.lists(st.binary(max_size=12), max_size=4), max_size=20),
    numbers=st.lists(st.integers(0, (1 << 64) - 1), max_size=5),
)
def test_no_request_harms_the_thread(requests: list[list[bytes]], numbers: list[int]) -> None:
    """Whatever frames come: those of the right form are answered in full, all others are passed over."""
    publisher = KvPublisher("ipc://unused", "ipc://unused", max_held=3)
    publisher._publish_socket = _Sink([])  # type: ignore[assignment]
    asked = [[b"r%d" % place, b"", number.to_bytes(8, "big")] for place, number in enumerate(numbers)]
    router = _Requests([*([b"x", *frames] for frames in requests), *asked])
    publisher.replay = router  # type: ignore[assignment]
    for number in range(5):
        publisher.publish([BlockRemoved([number])])
    while router.received or publisher.is_replaying:
        publisher.turn(list, has_requests=True)
    for place, number in enumerate(numbers):
        answers = [frames[2] for frames in router.sent if frames[0] == b"r%d" % place]
        assert answers == [*(one.to_bytes(8, "big") for one in range(2, 5) if one >= number), END]


class _Requests:
    """A ROUTER that has got these requests, and whose peers take everything."""

    def __init__(self, received: list[list[bytes]]) -> None:
        self.received = received
        self.sent: list[list[bytes]] = []

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self.received:
            raise zmq.Again
        return self.received.pop(0)

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        assert flags == zmq.NOBLOCK
        self.sent.append(frames)


class _Sink:
    def __init__(self, payloads: list[bytes]) -> None:
        self._payloads = payloads

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        assert flags == zmq.NOBLOCK and int.from_bytes(frames[1], "big") == len(self._payloads)
        self._payloads.append(frames[2])
