"""A worker link's life: legal moves, illegal ones, which change nothing, and what is due when."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decisions.link_state import MOVES, LinkError, LinkLife, LinkState
from shared import protocol as wire
from tests.fake_worker import CARD, LIMITS


def ready(epoch: int) -> wire.Ready:
    return wire.Ready(wire.PROTOCOL_VERSION, "", epoch, CARD, LIMITS, "fake")


def beat(expected_s: float = 0.0) -> wire.Beat:
    return wire.Beat(7, 1, 0, 0, 1, 1, expected_s=expected_s)


def test_a_worker_comes_and_goes() -> None:
    life = LinkLife()
    assert (life.state, life.epoch, life.hello_due(1.0)) == (LinkState.CONNECTING, -1, True)
    life.on_ready(ready(7), 1.0)
    assert (life.state, life.epoch, life.hello_due(9.0)) == (LinkState.READY, 7, False)
    life.on_beat(wire.Beat(7, 1, 0, 0, 1, 1), 2.0)
    assert life.silent_s(4.9) == 0.0 and life.silent_s(5.5) == 3.5
    life.on_lost()
    assert (life.state, life.epoch, life.lost_epoch, life.beat) == (LinkState.CONNECTING, -1, 7, None)
    life.close()
    assert life.state is LinkState.CLOSED


def test_a_refused_worker_is_asked_again_but_seldom() -> None:
    life = LinkLife()
    life.on_hello(10.0)
    life.refuse("another version")
    life.on_hello(10.0)
    assert not life.hello_due(11.0) and life.hello_due(15.0)
    life.on_ready(ready(2), 15.0)
    assert (life.state, life.refusal) == (LinkState.READY, "")


def test_two_workers_never_serve_at_once() -> None:
    life = LinkLife()
    life.on_ready(ready(1), 1.0)
    with pytest.raises(LinkError, match="ready to ready"):
        life.on_ready(ready(2), 2.0)
    assert life.epoch == 1


@given(st.lists(st.sampled_from(["ready", "lost", "refuse", "close"]), max_size=12))
def test_illegal_moves_raise_and_change_nothing(moves: list[str]) -> None:
    life = LinkLife()
    to = {
        "ready": LinkState.READY,
        "lost": LinkState.CONNECTING,
        "refuse": LinkState.REFUSED,
        "close": LinkState.CLOSED,
    }
    for epoch, move in enumerate(moves):
        calls: dict[str, Callable[[], object]] = {
            "ready": partial(life.on_ready, ready(epoch), float(epoch)),
            "lost": life.on_lost,
            "refuse": lambda: life.refuse("no"),
            "close": life.close,
        }
        before = [getattr(life, name) for name in LinkLife.__slots__]
        legal = to[move] in MOVES[life.state]
        try:
            calls[move]()
        except LinkError:
            assert not legal and before == [getattr(life, name) for name in LinkLife.__slots__]
        else:
            assert legal and life.state is to[move]
        assert (life.ready is not None) == (life.state is LinkState.READY)
        assert life.epoch == (-1 if life.ready is None else life.ready.epoch)
        assert bool(life.refusal) <= (life.state is not LinkState.READY)


def test_a_worker_may_be_silent_for_as_long_as_its_last_beat_expected_and_its_timeout_more() -> None:
    life = LinkLife()
    life.on_ready(ready(7), 0.0)
    assert life.silent_s(2.9) == 0 and life.silent_s(3.0) == 3.0
    life.on_beat(beat(5.0), 3.0)
    assert life.silent_s(10.9) == 0 and life.silent_s(11.0) == 8.0
    life.on_beat(beat(), 11.0)
    assert life.silent_s(14.0) == 3.0, "the next one expected nothing"


@pytest.mark.parametrize("expected_s", [float("inf"), float("nan"), -5.0, 1e9])
def test_nobody_is_waited_for_whatever_it_expects(expected_s: float) -> None:
    life = LinkLife()
    life.on_ready(ready(7), 0.0)
    life.on_beat(beat(expected_s), 0.0)
    assert life.silent_s(3.0) == 3.0
