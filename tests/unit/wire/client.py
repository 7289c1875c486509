"""A client as far as the gateway sees it: a listener, a bounded writer, a transport, and what was read from it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway.generation import Delta, End, GenerateRequest, RunningStream, SpatialObject
from gateway.transport.bounded import BoundedWriter
from shared.errors import ErrorCode, FinishReason
from tests.unit.wire.virtual_loop import VirtualLoop
from tests.unit.worker.loop.simulation import Answer
from worker.sim.tokenizer import FIRST_BYTE_ID

EVENT_BYTES = 512  # every event is padded to it, so that a few of them fill a buffer
BUFFER_BYTES = 4096
STALL_S = 1.0


class ClientTransport(asyncio.Transport):
    """A socket whose other end reads when it likes."""

    def __init__(self, loop: VirtualLoop, on_lost: Callable[[], None]) -> None:
        super().__init__()
        self.reading = True
        self.unread = bytearray()
        self.seen = bytearray()
        self._loop = loop
        self._on_lost = on_lost
        self._closing = False

    def write(self, data: Any) -> None:
        assert not self._closing
        self.unread += data
        if self.reading:
            self.read_on()

    def read_on(self) -> None:
        """The other end reads all there is, and whatever comes."""
        self.reading = True
        self.seen += self.unread
        self.unread.clear()

    def get_write_buffer_size(self) -> int:
        return len(self.unread)

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._on_lost)


@dataclass
class Habits:
    """What a client does besides reading: at which event it cancels or raises, and what it does at the end."""

    cancels_at: int = -1
    raises_at: int = -1
    error: type[Exception] = ConnectionResetError
    at_end: Callable[[], None] | None = None


@dataclass
class Client:
    """One request and everything its client saw. Faults found are put into `faults`: a listener's own would be caught."""

    request: GenerateRequest
    answer: Answer
    loop: VirtualLoop
    faults: list[str]
    habits: Habits = field(default_factory=Habits)
    handle: RunningStream | None = None
    submitted_s: float = 0.0
    refused: ErrorCode | None = None
    end: End | None = None
    ended_s: float = 0.0
    left: bool = False  # cancelled, hung up, raised, or was cut off
    was_slow: bool = False
    text: str = ""
    ids: list[int] = field(default_factory=list)
    objects: list[SpatialObject] = field(default_factory=list)
    num_events: int = 0

    def __post_init__(self) -> None:
        self._checked: tuple[object, ...] = ()  # what the last complete check saw
        self.transport = ClientTransport(self.loop, self.on_connection_lost)
        self.writer = self.loop.within(
            lambda: BoundedWriter(self.transport, self._on_stalled, limit_bytes=BUFFER_BYTES, stall_s=STALL_S)
        )

    # ------------------------------------------------------------ the listener

    def on_delta(self, delta: Delta) -> None:
        self._event()
        if delta.token_index != len(self.ids):
            self._fault(f"a delta begins at token {delta.token_index}, not {len(self.ids)}")
        self.text += delta.text
        self.ids += delta.token_ids
        if not self.whole_text.startswith(self.text) or self.ids != self.answer.tokens[: len(self.ids)]:
            self._fault(f"{self.ids} {self.text!r} does not begin {self.answer.tokens} {self.whole_text!r}")
        self._write({"text": delta.text})
        self._act()

    def on_object(self, found: SpatialObject) -> None:
        self._event()
        self.objects.append(found)
        if self.objects != self.whole_objects[: len(self.objects)]:
            self._fault(f"{self.objects} does not begin {self.whole_objects}")
        self._write({"object": [found.x, found.y, found.width, found.height]})
        self._act()

    def on_end(self, end: End) -> None:
        if self.end is not None:
            self._fault("two terminal events")
        self.end, self.ended_s = end, self.loop.time()
        self._write({"end": end.reason.value})
        self.loop.call_soon(self.writer.close)
        if self.habits.at_end is not None:
            at_end, self.habits.at_end = self.habits.at_end, None
            at_end()

    def _event(self) -> None:
        if self.end is not None:
            self._fault("an event after the terminal one")
        self.num_events += 1

    def _act(self) -> None:
        if self.num_events == self.habits.cancels_at:
            self.cancel()
        if self.num_events == self.habits.raises_at:
            self.left = True
            raise self.habits.error("the listener's own")

    def _write(self, event: dict[str, Any]) -> None:
        self.writer.write(json.dumps(event).ljust(EVENT_BYTES - 1).encode() + b"\n")

    def _fault(self, text: str) -> None:
        self.faults.append(f"{self.request.request_id}: {text}")

    # ------------------------------------------------------------ the person

    def cancel(self) -> None:
        """Ask the gateway to stop, as a closed handler does."""
        self.left = True
        if self.handle is not None:
            self.handle.cancel()

    def hang_up(self) -> None:
        """Close the connection; the gateway hears of it in its next turn."""
        self.left = True
        self.transport.abort()

    def stop_reading(self) -> None:
        """Leave unread what comes from now on."""
        self.was_slow = True
        self.transport.reading = False

    def on_connection_lost(self) -> None:
        """As the HTTP server cancels the handler, which cancels the stream."""
        self.cancel()

    def _on_stalled(self) -> None:
        if not self.was_slow:
            self._fault("a client that reads was cut off")

    # ------------------------------------------------------------ what it should have seen

    @property
    def whole_text(self) -> str:
        """The oracle's text, up to a stop string."""
        return self._until_stop()[0]

    @property
    def whole_objects(self) -> list[SpatialObject]:
        """The oracle's points or boxes."""
        num = 3 if self.request.task == "detect" else 2
        groups = [self.answer.values[i : i + num] for i in range(0, len(self.answer.values), num)]
        return [
            SpatialObject(group[0][0], group[1][0], *(group[2] if num == 3 else ()))
            for group in groups
            if len(group) == num
        ]

    def _until_stop(self) -> tuple[str, bool]:
        if self.request.task != "text":
            return "", False
        text = _text(self.answer.tokens)
        cut = min((at for stop in self.request.stop if (at := text.find(stop)) >= 0), default=-1)
        return (text, False) if cut < 0 else (text[:cut], True)

    def check_prefix(self) -> None:
        """It ended at its deadline: what is counted is what was shown."""
        assert self.end is not None
        num = self.end.usage.completion_tokens
        if self.request.task == "text" and not self.request.stop:
            assert self.text == _text(self.answer.tokens[:num]), "tokens were lost, and nobody said so"

    def check_complete(self) -> None:
        """It ended normally: everything the oracle says was shown, with its reason, and the bytes agree (I8)."""
        end = self.end
        assert end is not None and end.error is None
        if not self.transport.is_closing():
            self.transport.read_on()
        shown = (end, self.num_events, len(self.transport.seen), self.transport.is_closing())
        if shown == self._checked:
            return  # nothing has come since, and answers do not change
        text, stopped = self._until_stop()
        assert self.text == text and (self.request.task == "text" or self.objects == self.whole_objects)
        reason = FinishReason.STOP if stopped else self.answer.reason
        assert end.reason is reason, (end.reason, reason)
        assert (end.stop_string is not None) == stopped
        if not stopped:
            num_stop = end.usage.completion_tokens - len(self.answer.tokens)
            assert num_stop in ((0, 1) if reason is FinishReason.STOP else (0,)), "usage"
        if not self.transport.is_closing():
            events = [json.loads(line) for line in bytes(self.transport.seen).splitlines()]
            assert "".join(event.get("text", "") for event in events) == text
            assert [event for event in events if "end" in event] == [{"end": reason.value}] == events[-1:]
        self._checked = shown


def _text(token_ids: list[int]) -> str:
    return "".join(chr(i - FIRST_BYTE_ID) for i in token_ids if i >= FIRST_BYTE_ID)
