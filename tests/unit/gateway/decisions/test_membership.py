"""Addresses come at once, and go only when they are missing for long and nobody is reached there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.decisions.membership import MISSING_ANSWERS, MOST_ADDRESSES, Membership


def test_an_address_comes_with_its_first_answer_and_once() -> None:
    members = Membership()
    assert members.on_answer({"b", "a"}, lambda _: True) == (["a", "b"], [])
    assert members.on_answer({"a", "b"}, lambda _: True) == ([], [])


def test_an_address_goes_after_several_answers_without_it() -> None:
    members = Membership()
    members.on_answer({"a", "b"}, lambda _: True)
    for _ in range(MISSING_ANSWERS - 1):
        assert members.on_answer({"b"}, lambda _: True) == ([], [])
    assert members.on_answer({"b"}, lambda _: True) == ([], ["a"])
    assert members.endpoints == ["b"]
    assert members.on_answer({"a"}, lambda _: True) == (["a"], [])


def test_a_worker_that_serves_is_kept_whatever_answers_say() -> None:
    members = Membership()
    members.on_answer({"a"}, lambda _: False)
    for _ in range(10 * MISSING_ANSWERS):
        assert members.on_answer(set(), lambda _: False) == ([], [])
    assert members.on_answer(set(), lambda _: True) == ([], ["a"])


def test_a_seen_address_counts_its_absences_anew() -> None:
    members = Membership()
    members.on_answer({"a"}, lambda _: True)
    for _ in range(5):
        for _ in range(MISSING_ANSWERS - 1):
            assert members.on_answer(set(), lambda _: True) == ([], [])
        assert members.on_answer({"a"}, lambda _: True) == ([], [])


def test_addresses_are_bounded() -> None:
    members = Membership()
    new, _ = members.on_answer({f"{i:05}" for i in range(3 * MOST_ADDRESSES)}, lambda _: True)
    assert len(new) == MOST_ADDRESSES


@given(st.lists(st.sets(st.sampled_from("abcd")), max_size=20), st.sets(st.sampled_from("abcd")))
def test_what_is_told_adds_up_to_what_is_known(answers: list[set[str]], busy: set[str]) -> None:
    members, known = Membership(), set[str]()
    for answer in answers:
        new, gone = members.on_answer(answer, lambda endpoint: endpoint not in busy)
        assert not known & set(new) and set(gone) <= known - busy
        known = (known | set(new)) - set(gone)
        assert known == set(members.endpoints) and answer <= known
