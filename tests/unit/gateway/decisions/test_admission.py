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


def fill(admission: Admission, held: Occupancy, tenant: str, most: int = 1000) -> int:
    """Let a tenant take all it can get; returns how many places that is."""
    for number in range(most):
        try:
            admission.check(held, tenant)
        except RequestError:
            return number
        held.enter(tenant)
    return most


def test_whoever_is_alone_takes_all_places() -> None:
    admission = Admission(max_queue=128, max_wait_s=100)
    assert fill(admission, admission.occupancy(32, 200), "") == 160


@pytest.mark.parametrize(("rows", "queue"), [(32, 128), (2, 8), (1, 2)])
def test_a_tenant_who_has_most_leaves_places_for_others_to_begin_with(rows: int, queue: int) -> None:
    """Known tenants count, whether they ask or not. Then whatever drains goes to those who hold less, until all hold alike."""
    admission = Admission(queue, max_wait_s=1e9, num_tenants=lambda: 2)
    held = admission.occupancy(rows, queue)
    first = fill(admission, held, "a")
    kept = max(1, (rows + queue) // 16)
    assert first == rows + queue - kept
    assert "kept for them" in refusal(admission, held, "a").message
    assert fill(admission, held, "b") == kept
    for _ in range(4 * (rows + queue)):
        held.leave(max(held.tenants, key=lambda name: held.tenants[name]), 0.0)
        fill(admission, held, "a")  # who asks first, and most
        fill(admission, held, "b")
    assert abs(held.tenants["a"] - held.tenants["b"]) <= 2 * kept
    while held.tenants.get("b"):  # the other one is gone
        held.leave("b", 0.0)
    fill(admission, held, "a")
    assert held.tenants["a"] == first


@given(
    st.integers(1, 8),
    st.integers(1, 60),
    st.integers(2, 6),
    st.lists(st.tuples(st.sampled_from("eel"), st.integers(0, 5), st.integers(1, 40)), max_size=80),
)
def test_a_tenant_who_holds_nothing_finds_a_place(
    rows: int, queue: int, num: int, events: list[tuple[str, int, int]]
) -> None:
    """Unless another one, who holds only a few, was there before."""
    admission = Admission(queue, max_wait_s=1e9, num_tenants=lambda: num)
    held = admission.occupancy(rows, queue)
    for kind, number, times in events:
        tenant = str(number % num)
        for _ in range(times):
            if kind == "l" and held.tenants.get(tenant):
                held.leave(tenant, 0.0)
            elif kind == "e":
                with suppress(RequestError):
                    admission.check(held, tenant)
                    held.enter(tenant)
        assert held.num_active == sum(held.tenants.values()) <= held.capacity
        if len(held.tenants) < num and held.num_active == held.capacity:
            assert min(held.tenants.values()) <= held.few


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
