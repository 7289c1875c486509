"""Owns what a WebSocket client may send, frame by frame, before aiohttp's reader sees it. Gateway's loop, no I/O.

aiohttp's reader (in C) unmasks, joins and decodes; it does not insist on masks, and its limit is one for a connection's
whole life. This walks the frames' heads only: masks, order of fragments, and bytes by stage, before and after the key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiohttp import WebSocketError, WSCloseCode
from aiohttp.http import WebSocketReader

from gateway.decisions.holdings import Holding

LOCKED_MESSAGE_BYTES: Final = 4 << 10
LOCKED_FRAMES: Final = 16
_CONTINUATION: Final = 0x0
_CLOSE: Final = 0x8  # this and all above it are control frames


class FrameGuard:
    """Stands where aiohttp's protocol expects its `WebSocketReader`.

    It begins locked: one message of at most `LOCKED_MESSAGE_BYTES`, and nothing after it is read until `unlock`.
    """

    def __init__(self, reader: WebSocketReader, transport: asyncio.Transport) -> None:
        self._reader = reader
        self._transport = transport
        self._max_bytes = LOCKED_MESSAGE_BYTES
        self._holding: Holding | None = None  # None: locked
        self._held = b""  # what came behind the first message while locked
        self._waits = False  # locked, and the first message is whole
        self._num_frames = 0
        self._head = bytearray()  # of the frame whose head is incomplete
        self._payload_left = 0
        self._is_control = False
        self._in_message = False  # fragments are expected
        self._message_bytes = 0
        self._closes = False  # a close frame came: nothing behind it counts
        self._on_fault: Callable[[WebSocketError], None] | None = None
        self.fault: WebSocketError | None = None

    def attach(self, on_fault: Callable[[WebSocketError], None]) -> None:
        """Tell `on_fault` of the frame that breaks a rule, at once if it came already."""
        self._on_fault = on_fault
        if self.fault is not None:
            on_fault(self.fault)

    def unlock(self, max_bytes: int, holding: Holding) -> None:
        """The key is known: messages up to `max_bytes`, counted in `holding` while they are unfinished."""
        self._max_bytes = max_bytes
        self._holding = holding
        if self._waits:
            self._waits = False
            held, self._held = self._held, b""
            self._transport.resume_reading()
            self.feed_data(held)

    def feed_eof(self) -> None:
        """The connection is gone."""
        self._held = b""
        if self._holding is not None:
            self._holding.set(0)
        self._reader.feed_eof()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """See aiohttp's reader. A frame that breaks the rules ends the connection with its close code."""
        if self.fault is not None:
            return (
                False,
                b"",
            )  # read on and forget: bytes left unread would reset the connection before its close
        if self._waits:
            self._held += data
            return False, b""
        try:
            taken = self._walk(data)
        except WebSocketError as fault:
            self._fail(fault)
            return False, b""
        if taken < len(data):
            if not self._closes:
                self._waits = True
                self._held = data[taken:]
                self._transport.pause_reading()
            data = data[:taken]
        self._reader.feed_data(data)
        if self._holding is not None:
            self._holding.set(0 if self._is_between() else self._message_bytes)
        return False, b""

    def _fail(self, fault: WebSocketError) -> None:
        self.fault = fault
        if self._holding is not None:
            self._holding.set(0)
        if self._on_fault is not None:
            self._on_fault(fault)

    def _is_between(self) -> bool:
        return not self._in_message and (self._payload_left == 0 or self._is_control)

    def _walk(self, data: bytes) -> int:
        """Check the frames in `data`; returns how much of it may be passed on. Raises `WebSocketError`."""
        place, end = 0, len(data)
        while place < end:
            if self._payload_left:
                step = min(self._payload_left, end - place)
                self._payload_left -= step
                place += step
            else:
                place = self._read_head(data, place)
            if self._payload_left or self._head:
                continue
            if self._closes:
                return place
            if not self._is_control and not self._in_message:
                self._message_bytes = 0
                if self._holding is None:  # one whole message: the rest waits until its key was looked at
                    return place
        return place

    def _read_head(self, data: bytes, place: int) -> int:
        """Take bytes of a frame's head, and act on it once it is whole; returns the place behind them."""
        head = self._head
        while True:
            needed = _head_bytes(head)
            missing = needed - len(head)
            if missing <= 0:
                break
            piece = data[place : place + missing]
            head += piece
            place += len(piece)
            if len(piece) < missing:
                return place
        length = head[1] & 0x7F
        if length == 126:
            length = int.from_bytes(head[2:4], "big")
        elif length == 127:
            length = int.from_bytes(head[2:10], "big")
        self._on_head(head[0], bool(head[1] & 0x80), length)
        head.clear()
        return place

    def _on_head(self, first: int, is_masked: bool, length: int) -> None:
        opcode, is_final = first & 0x0F, bool(first & 0x80)
        if not is_masked:
            raise WebSocketError(WSCloseCode.PROTOCOL_ERROR, "a client's frames are masked")
        self._is_control = opcode >= _CLOSE
        self._payload_left = length
        self._num_frames += 1
        self._closes = opcode == _CLOSE
        if self._holding is None and self._num_frames > LOCKED_FRAMES:
            raise WebSocketError(WSCloseCode.POLICY_VIOLATION, "too many frames before the key")
        if self._is_control:
            return  # aiohttp's reader checks their size, their bits and that they are whole
        if self._in_message != (opcode == _CONTINUATION):
            raise WebSocketError(WSCloseCode.PROTOCOL_ERROR, "a message's frames are out of order")
        self._in_message = not is_final
        self._message_bytes += length
        if self._message_bytes > self._max_bytes:
            raise WebSocketError(WSCloseCode.MESSAGE_TOO_BIG, f"at most {self._max_bytes} bytes a message")
        if self._holding is not None and not self._holding.may_take(self._message_bytes):
            raise WebSocketError(WSCloseCode.TRY_AGAIN_LATER, "too much is being sent with this key at once")


def _head_bytes(head: bytearray) -> int:
    """How long a frame's head is, as far as its first bytes say."""
    if len(head) < 2:
        return 2
    size = {126: 4, 127: 10}.get(head[1] & 0x7F, 2)
    return size + 4 if head[1] & 0x80 else size
