"""Jobs in forks of their own are cut, lost and answered one by one; parties take turns."""

from __future__ import annotations

import os
import random
import signal

import pytest

from shared.forked_jobs import CUT, DIED, DONE, bytes_in_use, run_forked
from shared.turns import FairQueue


def spin(_: bytes) -> bytes:
    while True:
        pass


def lose(_: bytes) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def fail(_: bytes) -> bytes:
    raise ValueError("of the job")


def sleep(_: bytes) -> bytes:
    signal.sigtimedwait([], 0.2)  # longer than its limit of CPU time, none of which it uses
    return b"slept"


def test_a_job_ends_in_one_of_three_ways() -> None:
    outcome, data = run_forked(lambda body: body * 100_000, b"abc", 5.0)
    assert outcome.how == DONE and data == b"abc" * 100_000
    outcome, data = run_forked(spin, b"", 0.05)
    assert outcome.how == CUT and data == b"" and outcome.cpu_s < 1.0
    assert run_forked(sleep, b"", 0.05)[1] == b"slept"
    outcome, data = run_forked(lose, b"", 5.0)
    assert outcome.how == DIED and outcome.signal == signal.SIGKILL
    assert run_forked(fail, b"", 5.0)[0].how == DIED


def test_memory_in_use_grows_by_what_is_allocated() -> None:
    before = bytes_in_use()
    kept = bytearray(8 << 20)
    assert bytes_in_use() - before >= 7 << 20
    del kept


@pytest.mark.parametrize("seed", range(5))
def test_parties_take_turns_and_keep_their_own_order(seed: int) -> None:
    rng = random.Random(seed)
    queue: FairQueue[tuple[str, int]] = FairQueue()
    pushed: dict[str, list[int]] = {}
    popped: dict[str, list[int]] = {}
    since: dict[str, int] = {}
    number = 0
    for _ in range(400):
        if rng.random() < 0.6:
            party = rng.choice("aaaaab" + "c")
            queue.push(party, (party, number))
            pushed.setdefault(party, []).append(number)
            number += 1
        elif len(queue):
            waiting = [party for party in pushed if len(pushed[party]) > len(popped.get(party, ()))]
            party, item = queue.pop()
            popped.setdefault(party, []).append(item)
            since = {other: since.get(other, 0) + 1 for other in waiting if other != party}
            assert all(turns <= 3 for turns in since.values()), "a party waited while others had two turns"
    for party, items in popped.items():
        assert items == pushed[party][: len(items)]
    while len(queue):
        queue.pop()
    with pytest.raises(IndexError):
        queue.pop()
