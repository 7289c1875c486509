"""The same content goes to the same worker, unless that one is busy; whoever comes or goes moves only its own."""

from __future__ import annotations

from gateway.decisions.affinity import HEAD_STEP, HEAD_TOKENS, Candidate, content_key, home

KEYS = [f"content {i}".encode() for i in range(600)]


def idle(*names: str) -> list[Candidate]:
    return [Candidate(name, 0, 32) for name in names]


def test_short_texts_belong_nowhere() -> None:
    assert content_key("", [], list(range(HEAD_STEP - 1))) is None
    assert content_key("", [], list(range(HEAD_STEP))) is not None


def test_a_conversation_keeps_its_key_as_it_grows() -> None:
    start = list(range(HEAD_TOKENS))
    assert content_key("t", [], [*start, 1, 2, 3]) == content_key("t", [], start + [4] * 900)
    assert content_key("t", [], start) != content_key("u", [], start)
    assert content_key("t", [], start) != content_key("t", [], [9, *start[1:]])


def test_pictures_alone_decide_where_there_are_any() -> None:
    assert content_key("", [b"one"], [1] * 500) == content_key("", [b"one"], [2])
    assert content_key("", [b"one"], []) != content_key("", [b"one", b"two"], [])


def test_order_of_the_workers_does_not_matter_and_all_get_their_part() -> None:
    names = ["tcp://a:1", "tcp://b:1", "tcp://c:1"]
    counts = dict.fromkeys(names, 0)
    for key in KEYS:
        first, second = home(key, idle(*names)), home(key, idle(*reversed(names)))
        assert first is not None and second is not None and names[first] == names[2 - second]
        counts[names[first]] += 1
    assert all(130 < count < 270 for count in counts.values()), counts


def test_a_worker_that_comes_takes_only_what_becomes_its_own() -> None:
    for key in KEYS:
        before, after = home(key, idle("a", "b")), home(key, idle("a", "b", "c"))
        assert after in (before, 2)


def test_a_busy_worker_is_passed_over() -> None:
    key = next(key for key in KEYS if home(key, idle("a", "b")) == 0)
    a_few, many = (
        [Candidate("a", 7, 32), Candidate("b", 0, 32)],
        [Candidate("a", 20, 32), Candidate("b", 2, 32)],
    )
    assert home(key, a_few) == 0  # a quarter of its rows: not busy, though the other is idle
    assert home(key, many) == 1
    assert home(key, [Candidate("a", 20, 32), Candidate("b", 19, 32)]) == 0  # all are busy alike


def test_somebody_is_always_left() -> None:
    for loads in ((0, 0), (1, 0), (50, 50), (3, 90)):
        assert home(b"k", [Candidate(str(i), load, 4) for i, load in enumerate(loads)]) is not None
