"""What a worker is believed to have: as much as it says that it keeps, the least recently used gone first."""

from __future__ import annotations

from gateway.decisions.held import Held


def test_the_least_recently_used_are_forgotten() -> None:
    held = Held(30)
    for key in (b"a", b"b", b"c"):
        held.add(key, 10)
    held.add(b"a", 10)
    held.add(b"d", 10)
    assert [key in held for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    held.add(b"e", 25)
    assert [key in held for key in (b"a", b"c", b"d", b"e")] == [False, False, False, True]


def test_a_worker_keeps_the_last_one_however_large_it_is() -> None:
    held = Held(0)
    held.add(b"a", 10)
    assert b"a" in held
    held.add(b"b", 10)
    assert b"a" not in held and b"b" in held
