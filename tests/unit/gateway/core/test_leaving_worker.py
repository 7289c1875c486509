"""A worker that drains turns requests away; nobody's client hears of it as long as another worker, or a new one, takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gateway.decisions.affinity import HEAD_STEP
from shared.errors import ErrorCode, FinishReason
from tests.fake_worker import Action, End, FakeWorker, Reject, Token, Wait, text_ids
from tests.gateway_thread import GatewayThread
from tests.http_client import ask
from tests.unit.gateway.core.test_worker_loss import CHAT, chat, in_background

LEAVES: dict[str, list[Action]] = {
    "refuses it": [Reject(ErrorCode.SHUTTING_DOWN)],
    "never begins it": [Wait(0.05), End(FinishReason.ERROR, code=ErrorCode.SHUTTING_DOWN)],
}


@contextmanager
def two_workers() -> Iterator[tuple[GatewayThread, FakeWorker, FakeWorker]]:
    with (
        FakeWorker() as first,
        FakeWorker(epoch=2) as second,
        GatewayThread(workers=[first.endpoint, second.endpoint]) as gateway,
    ):
        gateway.wait_for(lambda: all(w.link.ready is not None for w in gateway.gateway.service.workers))
        yield gateway, first, second


@pytest.mark.parametrize("way", LEAVES)
def test_another_worker_takes_what_a_leaving_one_has_not_begun(way: str) -> None:
    with two_workers() as (gateway, first, second):
        asked: list[FakeWorker] = []

        def leave_if_first(worker: FakeWorker) -> list[Action]:
            asked.append(worker)
            return LEAVES[way] if worker is asked[0] else [*map(Token, text_ids("served")), End()]

        first.script, second.script = lambda _: leave_if_first(first), lambda _: leave_if_first(second)
        for _ in range(4):  # it is not asked again, before its heartbeat says that it drains
            answer = ask(gateway.url, CHAT, chat())
            assert answer.status == 200 and b"served" in answer.body
        assert asked.count(asked[0]) == 1 and len(asked) == 5


@pytest.mark.parametrize("way", LEAVES)
def test_with_one_worker_they_wait_for_the_next(gateway: GatewayThread, worker: FakeWorker, way: str) -> None:
    worker.script = lambda _: LEAVES[way]
    thread, answers = in_background(lambda: ask(gateway.url, CHAT, chat()))
    worker.wait_submits(1)
    gateway.wait_for(lambda: gateway.gateway.service.num_recovering == 1)
    assert ask(gateway.url, CHAT, chat()).status == 503
    worker.die()
    worker.reply("by the next")
    worker.restart()
    thread.join(10)
    assert answers[0].status == 200 and b"by the next" in answers[0].body


def test_what_was_begun_ends_with_its_worker(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.script = lambda _: [
        *map(Token, text_ids("begun")),
        End(FinishReason.ERROR, code=ErrorCode.SHUTTING_DOWN),
    ]
    assert ask(gateway.url, CHAT, chat()).error["code"] == "shutting_down"


def test_long_prompts_and_their_continuations_meet_on_one_worker() -> None:
    with two_workers() as (gateway, first, second):
        for number in range(12):  # all on one: once in two thousand runs
            before = len(first.submits), len(second.submits)
            start = f"{number} " + "x" * 4 * HEAD_STEP
            for end in ("", " and on", " and on and on"):
                assert ask(gateway.url, CHAT, chat(start + end)).status == 200
            after = len(first.submits), len(second.submits)
            assert sorted((after[0] - before[0], after[1] - before[1])) == [0, 3]
        assert first.submits and second.submits
