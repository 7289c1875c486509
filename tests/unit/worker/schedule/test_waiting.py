"""Who is admitted next: priority, then the tenant served least, then arrival; and what that means in the loop."""

from __future__ import annotations

from shared.protocol import Sampling
from tests.unit.worker.loop.simulation import Simulation
from worker.schedule.sequence import Sequence
from worker.schedule.waiting import WaitingQueue


def waiting(number: int, tenant: str = "", priority: int = 0) -> Sequence:
    return Sequence(b"g", number, str(number), [20], 1, 10, Sampling(), frozenset(), float(number), tenant=tenant, priority=priority)  # fmt: skip


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while (seq := queue.peek()) is not None:
        queue.take(seq)
        order.append(seq.sequence_id)
    return order


def test_lower_priority_numbers_go_first_and_equals_by_arrival() -> None:
    queue = WaitingQueue()
    for number, priority in enumerate([1, 0, 1, 0]):
        queue.push(waiting(number, priority=priority))
    assert drain(queue) == [1, 3, 0, 2]
    assert len(queue) == 0


def test_a_burst_of_one_tenant_does_not_starve_another() -> None:
    queue = WaitingQueue()
    for number in range(6):
        queue.push(waiting(number, "loud"))
    queue.push(waiting(6, "quiet"))
    queue.push(waiting(7, "quiet"))
    assert drain(queue) == [0, 6, 1, 7, 2, 3, 4, 5]


def test_a_tenant_gets_no_credit_for_having_been_away() -> None:
    queue = WaitingQueue()
    for number in range(4):
        queue.push(waiting(number, "busy"))
    for _ in range(2):
        seq = queue.peek()
        assert seq is not None
        queue.take(seq)
    for number in range(4, 8):
        queue.push(waiting(number, "late"))
    assert drain(queue) == [2, 4, 3, 5, 6, 7]


def test_a_preempted_sequence_comes_before_its_tenants_others() -> None:
    queue = WaitingQueue()
    queue.push(waiting(1))
    queue.push_front(waiting(0))
    assert drain(queue) == [0, 1]


def test_in_the_loop_the_urgent_request_overtakes_the_queue() -> None:
    sim = Simulation(max_rows=1)
    calm = [sim.submit([20, 30 + i], 6) for i in range(4)]
    urgent = sim.submit([20, 50], 6, priority=-1)
    sim.run()
    sim.check_at_rest()
    assert urgent.finish is not None
    waited = [stream.finish.timing.queue_s for stream in calm if stream.finish is not None]
    assert urgent.finish.timing.queue_s < min(waited[1:])


def test_who_waits_for_pages_is_passed_over_and_keeps_its_place() -> None:
    queue = WaitingQueue()
    first, second = waiting(1), waiting(2)
    queue.push(first)
    queue.push(second)
    first.awaits_pages = True
    assert queue.peek() is second
    second.awaits_pages = True
    assert queue.peek() is None and len(queue) == 2
    first.awaits_pages = False
    assert queue.peek() is first
