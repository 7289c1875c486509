"""Who may enter, and what a refusal says."""

from __future__ import annotations

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
