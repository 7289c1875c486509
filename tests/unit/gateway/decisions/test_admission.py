"""Who may enter, and what a refusal says."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decisions.admission import Admission, Occupancy
from gateway.generation import RequestError
from shared.errors import ErrorCode


def refusal(admission: Admission, held: Occupancy, tenant: str = "", num_new: int = 1) -> RequestError:
    with pytest.raises(RequestError) as caught:
        admission.check(held, tenant, num_new)
    return caught.value


def test_a_full_lane_refuses_with_a_time_from_the_drain_rate() -> None:
    admission = Admission(max_queue=2, max_wait_s=30)
    held = admission.occupancy(max_rows=2, max_waiting=10)
    assert held.capacity == 4
    for _ in range(4):
        admission.check(held, "")
        held.enter("")
    held.on_beat(drain_rate=0.5, num_waiting=2)
    error = refusal(admission, held)
    assert error.code is ErrorCode.QUEUE_FULL and error.retry_after_s == pytest.approx(2.0)
    held.leave("", 1.0)
    admission.check(held, "")


def test_a_queue_that_would_take_too_long_is_refused_before_it_is_full() -> None:
    admission = Admission(max_queue=100, max_wait_s=5)
    held = admission.occupancy(1, 100)
    held.on_beat(drain_rate=1.0, num_waiting=1)
    for _ in range(6):
        admission.check(held, "")
        held.enter("")
    assert refusal(admission, held).code is ErrorCode.QUEUE_FULL


def test_an_idle_workers_rate_says_nothing() -> None:
    admission = Admission(max_queue=100, max_wait_s=5)
    held = admission.occupancy(1, 100)
    held.on_beat(drain_rate=0.01, num_waiting=0)
    held.enter("")
    admission.check(held, "")


def test_more_choices_than_the_lane_can_ever_hold_are_the_clients_fault() -> None:
    admission = Admission(max_queue=1, max_wait_s=5)
    assert refusal(admission, admission.occupancy(2, 5), num_new=4).code is ErrorCode.INVALID_REQUEST


def test_a_tenant_over_its_share_is_refused_only_while_others_wait() -> None:
    admission = Admission(max_queue=8, max_wait_s=100, tenant_share=0.5)
    held = admission.occupancy(2, 8)
    for _ in range(5):
        admission.check(held, "a")
        held.enter("a")
    admission.check(held, "a")
    held.enter("b")
    assert "share" in refusal(admission, held, "a").message
    admission.check(held, "b")


@given(st.lists(st.sampled_from(["enter a", "enter b", "leave"]), max_size=80), st.integers(0, 5))
def test_the_bound_holds_and_counts_return_to_zero(events: list[str], max_queue: int) -> None:
    admission = Admission(max_queue, max_wait_s=10)
    held = admission.occupancy(3, 100)
    inside: list[str] = []
    now_s = 0.0
    for event in events:
        now_s += 0.5
        if event == "leave" and inside:
            held.leave(inside.pop(), now_s)
        elif event != "leave":
            tenant = event[-1]
            try:
                admission.check(held, tenant)
            except RequestError as error:
                assert error.retry_after_s > 0
            else:
                held.enter(tenant)
                inside.append(tenant)
        assert held.num_active == len(inside) <= 3 + max_queue
    for tenant in inside:
        held.leave(tenant, now_s)
    assert held.num_active == 0 and not held.tenants


class Sharers:
    """Gateways over one worker, which tells them at each beat how many places are taken."""

    def __init__(self, num: int, max_rows: int, max_queue: int) -> None:
        self.admission = Admission(max_queue, max_wait_s=1e9)
        self.gateways = [self.admission.occupancy(max_rows, max_queue) for _ in range(num)]
        self.capacity = max_rows + max_queue

    @property
    def num_held(self) -> int:
        return sum(gateway.num_active for gateway in self.gateways)

    def beat(self) -> None:
        held = self.num_held
        for gateway in self.gateways:
            gateway.share(len(self.gateways), held)

    def ask(self, number: int, times: int) -> int:
        """Requests that arrive at one gateway; returns how many got in."""
        gateway, before = self.gateways[number], self.gateways[number].num_active
        for _ in range(times):
            with suppress(RequestError):
                self.admission.check(gateway, "")
                gateway.enter("")
        return gateway.num_active - before

    def leave(self, number: int, times: int) -> None:
        for _ in range(min(times, self.gateways[number].num_active)):
            self.gateways[number].leave("", 0.0)


@given(
    st.integers(2, 5),
    st.integers(1, 8),
    st.integers(0, 64),
    st.lists(st.tuples(st.sampled_from("abl"), st.integers(0, 4), st.integers(1, 100)), max_size=60),
)
def test_several_gateways_keep_the_bound_together(
    num: int, rows: int, queue: int, events: list[tuple[str, int, int]]
) -> None:
    all_of_them = Sharers(num, rows, queue)
    all_of_them.beat()
    for kind, number, times in events:
        if kind == "b":
            all_of_them.beat()
        elif kind == "a":
            all_of_them.ask(number % num, times)
        else:
            all_of_them.leave(number % num, times)
        # A single free place cannot be cut into parts: the worker itself refuses those who come second to it.
        assert all_of_them.num_held <= all_of_them.capacity + num - 1


def test_what_others_leave_unused_is_borrowed_and_given_back() -> None:
    both = Sharers(2, 8, 56)
    for _ in range(10):
        both.beat()
        both.ask(0, 100)
    borrowed = both.gateways[0].num_active
    assert both.capacity - 8 <= borrowed < both.capacity  # nearly all, but for the few places kept free
    assert both.ask(1, 100) > 0  # which the other one begins with, at once
    for _ in range(40):
        both.leave(0, 4)
        both.leave(1, 4)
        both.beat()
        both.ask(0, 100)
        both.ask(1, 100)
    one, other = (gateway.num_active for gateway in both.gateways)
    assert abs(one - other) <= 8
    for gateway in both.gateways:  # the other one is gone: all places are this one's
        gateway.share(1, both.num_held)
        assert gateway.limit == both.capacity
