"""Catching up: no faster than the client reads, live afterwards, and told where the stream outran it."""

from __future__ import annotations

import asyncio

import pytest

from gateway.config import GatewayConfig
from gateway.core.metrics import Metrics
from gateway.decisions.journals import Journal
from gateway.generation import RequestError
from gateway.transport.resumption import Resumption
from shared.errors import ErrorCode

EVENT = b"x" * 500


class Stream:
    def cancel(self) -> None:
        pass


class SlowReader:
    """Takes whatever comes, and reads 700 bytes of it whenever it is looked at."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.unread = self.most_unread = 0
        self.is_over = self.is_replaced = False

    def take(self, number: int, event: bytes) -> None:
        self.numbers.append(number)
        self.unread += len(event)
        self.most_unread = max(self.most_unread, self.unread)

    def unread_bytes(self) -> int:
        self.unread = max(0, self.unread - 700)
        return self.unread

    def over(self) -> None:
        self.is_over = True

    def replaced(self) -> None:
        self.is_replaced = True


def opened(num_events: int, **settings: int) -> tuple[Resumption, Journal]:
    resumption = Resumption(GatewayConfig(write_buffer_bytes=8192, **settings), Metrics())
    journal = resumption.open("s", "t", Stream())
    for _ in range(num_events):
        resumption.journals.write(journal, EVENT)
    return resumption, journal


def test_a_slow_reader_is_waited_for_and_then_live() -> None:
    async def go() -> None:
        resumption, journal = opened(100)
        reader = SlowReader()
        resumption.journals.attach(journal, reader, is_live=False)
        task = asyncio.ensure_future(resumption.catch_up(journal, reader, 9, reader.unread_bytes))
        await asyncio.sleep(0.05)
        assert not task.done() and reader.most_unread <= 8192
        resumption.journals.write(journal, EVENT)  # while it catches up
        await task
        resumption.journals.write(journal, EVENT)  # live
        assert reader.numbers == list(range(10, 102))
        before = reader.is_over
        resumption.end(journal)
        assert (before, reader.is_over) == (False, True)
        assert reader.most_unread <= 8192
        resumption.close()

    asyncio.run(go())


def test_one_that_is_outrun_is_told_and_one_that_is_replaced_stops() -> None:
    async def go() -> None:
        resumption, journal = opened(20, resume_bytes=20_000)
        outrun = SlowReader()
        resumption.journals.attach(journal, outrun, is_live=False)
        task = asyncio.ensure_future(resumption.catch_up(journal, outrun, -1, outrun.unread_bytes))
        await asyncio.sleep(0)
        for _ in range(60):
            resumption.journals.write(journal, EVENT)
        with pytest.raises(RequestError) as caught:
            await task
        assert caught.value.code is ErrorCode.SLOW_CLIENT and len(outrun.numbers) < 20
        first, second = SlowReader(), SlowReader()
        resumption.journals.attach(journal, first, is_live=False)
        task = asyncio.ensure_future(resumption.catch_up(journal, first, journal.first, first.unread_bytes))
        await asyncio.sleep(0)
        resumption.journals.attach(journal, second, is_live=False)
        taken = len(first.numbers)
        await task
        assert first.is_replaced and len(first.numbers) == taken and not journal.is_live
        resumption.close()

    asyncio.run(go())
