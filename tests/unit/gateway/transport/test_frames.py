"""Frames as another implementation of RFC 6455 reads them."""

from __future__ import annotations

import asyncio

import pytest
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from gateway.transport.frames import FrameWriter, text_frame


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_frames_parse_elsewhere(length: int) -> None:
    payload = b"\xc3\xa9" * (length // 2) + b"x" * (length % 2)
    reader = StreamReader()
    reader.feed_data(text_frame(payload))
    parsing = Frame.parse(reader.read_exact, mask=False)
    with pytest.raises(StopIteration) as caught:
        next(parsing)
    frame = caught.value.value
    assert (frame.opcode, frame.fin, bytes(frame.data)) == (Opcode.TEXT, True, payload)


class Pipe(asyncio.Transport):
    """A transport whose client reads only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.unread = 0
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.unread += len(data)

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


async def test_a_client_that_leaves_too_much_unread_is_cut_off_once() -> None:
    pipe, stalls = Pipe(), []
    writer = FrameWriter(pipe, lambda: stalls.append(1), limit_bytes=1000, stall_s=10)
    for _ in range(20):
        writer.write(b"x" * 100)
    assert pipe.aborted and stalls == [1] and pipe.unread <= 1000 + 104
