"""Sums of unfinished bytes by tenant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.decisions.holdings import Holdings

STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=40)


@given(STEPS)
def test_no_tenant_holds_more_than_the_limit_and_nothing_is_left(steps: list[tuple[int, int]]) -> None:
    holdings = Holdings(100)
    parts = [holdings.holding("ab"[number % 2]) for number in range(6)]
    sizes = [0] * 6
    for number, size in steps:
        others = sum(sizes[i] for i in range(6) if i % 2 == number % 2 and i != number)
        assert parts[number].may_take(size) == (others + size <= 100)
        if parts[number].may_take(size):
            parts[number].set(size)
            sizes[number] = size
        assert holdings.of("a") == sum(sizes[::2]) and holdings.of("b") == sum(sizes[1::2])
    for part in parts:
        part.set(0)
    assert holdings._sums == {}
