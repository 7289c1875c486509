"""Pictures that wait to be encoded: tenants in turn, each one's oldest first."""

from __future__ import annotations

from worker.schedule.encode_queue import EncodeJob, EncodeQueue
from worker.schedule.sequence import Picture, Run

PICTURE = Picture((Run(0, 1, 0),), (), (), b"")


def job(number: int, tenant: str = "", gateway: bytes = b"g") -> EncodeJob:
    return EncodeJob(gateway, number, tenant, PICTURE)


def taken(queue: EncodeQueue) -> list[int]:
    found = []
    while (one := queue.take()) is not None:
        found.append(one.job_id)
    return found


def test_who_sends_many_delays_only_his_own() -> None:
    queue = EncodeQueue(10)
    for number in range(4):
        queue.put(job(number, "many"))
    queue.put(job(8, "one"))
    queue.put(job(9, "two"))
    assert len(queue) == 6 and not queue.is_full
    assert taken(queue) == [0, 8, 9, 1, 2, 3]
    assert not len(queue)


def test_what_nobody_waits_for_leaves() -> None:
    queue = EncodeQueue(4)
    for number in range(3):
        queue.put(job(number, str(number % 2)))
    queue.put(job(1, "0", b"other"))
    assert queue.is_full and (b"g", 1) in queue
    for _ in range(2):
        queue.drop((b"g", 1))
    assert len(queue) == 3
    queue.drop_gateway(b"g")
    assert taken(queue) == [1] and queue.take() is None
