"""Owns the sockets on which routers hear which prefixes this worker has cached. The I/O thread.

The format is vLLM's (`vllm.distributed.kv_events`), because that is what routers read (llm-d, Dynamo, AIBrix). Each message of the
PUB socket has three frames: a topic, a sequence number of 8 bytes (big endian, from 0) and msgpack `[time, events, 0]`, the last
being a rank that is always 0 here. An event is an array that begins with its name, or a map whose `type` that is.

Whoever misses a number sends the first one it wants, 8 bytes behind an empty frame, to the ROUTER socket, and gets empty frame,
number and payload of each message that is still held, then the number −1 without a payload.

Nobody is waited for: PUB drops what a slow subscriber does not take, and a replay goes on in small pieces as its reader takes them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

import msgspec
import structlog
import zmq

from worker.schedule.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, ExtraKeys, KvEvent

log = structlog.get_logger()

MEDIUM: Final = "GPU"
"""The name of the memory that steps read, the first tier of any router; said on a CPU as well."""

MAX_HELD: Final = 10_000  # messages for replays
MAX_HELD_BYTES: Final = 64 << 20
HWM: Final = 10_000  # messages that one slow subscriber, or one replay, may have queued
MAX_REPLAYS: Final = 8  # at once; a further one takes the place of the oldest
REPLAY_SLICE: Final = 64  # messages of a replay between looks at the other sockets
MAX_REQUEST_BYTES: Final = 64
END: Final = (-1).to_bytes(8, "big", signed=True)

Form = Literal["arrays", "maps"]


class CannotPublish(Exception):
    """An address cannot be bound."""


@dataclass(slots=True)
class _Replay:
    reader: bytes
    next: int  # the number of the next message it gets


class KvPublisher:
    """A PUB socket and, where it has an address, a ROUTER socket for replays. `open` first, `close` last, both in one thread."""

    def __init__(
        self,
        address: str,
        replay_address: str | None,
        topic: str = "",
        form: Form = "arrays",
        *,
        now: Callable[[], float] = time.time,
        max_held: int = MAX_HELD,
    ) -> None:
        self._address = address
        self._replay_address = replay_address
        self._topic = topic.encode()
        self._form = form
        self._now = now
        self._max_held = max_held
        # Of its own: keys of the worker's other socket would be asked for here too.
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._publish_socket: zmq.Socket[bytes] | None = None
        self.replay: zmq.Socket[bytes] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._next = 0
        self._held: deque[bytes] = deque()  # the last messages' payloads, up to number `_next` - 1
        self._held_bytes = 0
        self._replays: dict[bytes, _Replay] = {}
        self.num_bad_requests = 0

    def open(self) -> None:
        """Bind. Raises CannotPublish, naming the setting."""
        self._context = zmq.Context()
        self._publish_socket = self._bind(zmq.PUB, "kv_events", self._address)
        if self._replay_address is not None:
            self.replay = self._bind(zmq.ROUTER, "kv_events_replay", self._replay_address)

    def close(self) -> None:
        """Unbind; what is queued has half a second to leave. Idempotent."""
        for socket in (self._publish_socket, self.replay):
            if socket is not None:
                socket.close(500)
        if self._context is not None:
            self._context.term()
        self._publish_socket = self.replay = self._context = None

    @property
    def is_replaying(self) -> bool:
        """Whether some reader has not got all it asked for."""
        return bool(self._replays)

    def turn(self, take: Callable[[], list[KvEvent]], *, has_requests: bool) -> None:
        """Publish what `take` gives until it gives nothing, read requests if there are any, and go on with each replay by a
        piece."""
        while events := take():
            self.publish(events)
        if self.replay is not None:
            if has_requests:
                self._read_requests(self.replay)
            for one in list(self._replays.values()):
                self._go_on(self.replay, one)

    def publish(self, events: list[KvEvent]) -> None:
        """Send one message, and hold it for replays."""
        assert self._publish_socket is not None
        encode = _as_array if self._form == "arrays" else _as_map
        payload = self._encoder.encode([self._now(), [encode(event) for event in events], 0])
        # A PUB socket never waits: a subscriber whose queue is full loses the message, and sees the gap.
        self._publish_socket.send_multipart([self._topic, _number(self._next), payload], zmq.NOBLOCK)
        self._next += 1
        if self.replay is not None:
            self._held.append(payload)
            self._held_bytes += len(payload)
            while len(self._held) > self._max_held or self._held_bytes > MAX_HELD_BYTES:
                self._held_bytes -= len(self._held.popleft())

    # ------------------------------------------------------------------ replays

    def _read_requests(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(MAX_REPLAYS):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
                self.num_bad_requests += 1
                if self.num_bad_requests == 1:
                    log.warning("kv_replay_refused", detail="a request is an empty frame and 8 bytes")
                continue
            reader = frames[0]
            self._replays.pop(reader, None)  # it starts again
            if len(self._replays) >= MAX_REPLAYS:
                del self._replays[next(iter(self._replays))]
            self._replays[reader] = _Replay(reader, int.from_bytes(frames[2], "big"))

    def _go_on(self, socket: zmq.Socket[bytes], one: _Replay) -> None:
        first = self._next - len(self._held)
        one.next = min(max(one.next, first), self._next)  # a reader may name any number
        payloads = list(islice(self._held, one.next - first, one.next - first + REPLAY_SLICE))
        try:
            for payload in payloads:
                socket.send_multipart([one.reader, b"", _number(one.next), payload], zmq.NOBLOCK)
                one.next += 1
            if one.next >= self._next:
                socket.send_multipart([one.reader, b"", END, b""], zmq.NOBLOCK)
                del self._replays[one.reader]
        except zmq.Again:
            pass  # it reads slowly: on with it in a later turn
        except zmq.ZMQError:  # it has left
            del self._replays[one.reader]

    def _bind(self, kind: int, setting: str, address: str) -> zmq.Socket[bytes]:
        assert self._context is not None
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, HWM)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES if kind == zmq.ROUTER else 1 << 10)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a slow or vanished reader is an error, not silence
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise CannotPublish(f"cannot bind {setting} {address}: {error}") from None
        return socket


def _number(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _as_array(event: KvEvent) -> list[object]:
    if isinstance(event, BlockStored):
        # lora_id, medium and lora_name stand before the extra keys, which are left out where there are none.
        fields: list[object] = [
            "BlockStored",
            event.hashes,
            event.parent,
            event.token_ids,
            event.block_tokens,
        ]
        fields += [None, MEDIUM, None]
        return [*fields, event.extra_keys] if any(event.extra_keys) else fields
    if isinstance(event, BlockRemoved):
        return ["BlockRemoved", event.hashes, MEDIUM]
    assert isinstance(event, AllBlocksCleared)
    return ["AllBlocksCleared"]


def _as_map(event: KvEvent) -> dict[str, object]:
    if isinstance(event, BlockStored):
        extra: dict[str, list[ExtraKeys | None]] = (
            {"extra_keys": event.extra_keys} if any(event.extra_keys) else {}
        )
        return {
            "type": "BlockStored",
            "block_hashes": event.hashes,
            "parent_block_hash": event.parent,
            "token_ids": event.token_ids,
            "block_size": event.block_tokens,
            "lora_id": None,
            "medium": MEDIUM,
            "lora_name": None,
            **extra,
        }
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "block_hashes": event.hashes, "medium": MEDIUM}
    assert isinstance(event, AllBlocksCleared)
    return {"type": "AllBlocksCleared"}
