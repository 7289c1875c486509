"""The lives of a sequence and of its mask: what may follow what, and that anything else changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import ErrorCode, FinishReason
from tests.unit.worker.schedule.examples import mask_of, sequence
from worker.constraints.automaton import TokenAutomaton, spatial_tables
from worker.schedule.life import LIFE_MOVES, MASK_MOVES, Life, LifeError, MaskLife, mask_moved, moved
from worker.sim.runner import fake_card

MASK = np.zeros(4, np.int32)


def constrained() -> TokenAutomaton:
    card = fake_card()
    return TokenAutomaton(
        spatial_tables(
            coord_id=5, size_id=6, end_id=0, with_size=True, max_objects=2, vocab_size=card.vocab_size
        )
    )


def test_a_life_from_queue_to_release() -> None:
    seq = sequence()
    for life in (Life.RUNNING, Life.PREEMPTED, Life.WAITING, Life.RUNNING):
        seq.move_to(life)
    seq.end(FinishReason.STOP)
    assert seq.life is Life.FINISHED and seq.finish is FinishReason.STOP and seq.holds
    seq.move_to(Life.RELEASED)
    assert not seq.holds


@pytest.mark.parametrize("state", Life)
@pytest.mark.parametrize("to", Life)
def test_every_other_move_is_refused(state: Life, to: Life) -> None:
    if to in LIFE_MOVES[state]:
        assert moved(state, to) is to
    else:
        with pytest.raises(LifeError, match=f"{state.value} cannot become {to.value}"):
            moved(state, to)


def test_a_sequence_finishes_once_and_keeps_its_first_reason() -> None:
    seq = sequence()
    seq.end(FinishReason.CANCELLED)
    with pytest.raises(LifeError):
        seq.end(FinishReason.ERROR, (ErrorCode.INTERNAL, "late"))
    assert seq.finish is FinishReason.CANCELLED and seq.error is None


def test_masks_are_the_hosts_only_while_no_automaton_lies_on_the_device() -> None:
    assert sequence().mask is MaskLife.NONE
    seq = sequence(constraint=constrained())
    assert mask_of(seq) is MaskLife.DUE
    seq.place_automaton(3)
    assert mask_of(seq) is MaskLife.NONE and seq.table_place == 3
    seq.place_automaton(0)
    assert seq.mask is MaskLife.DUE


def test_a_slow_mask_is_awaited_taken_once_and_awaited_again_while_it_stays_slow() -> None:
    seq = sequence(constraint=constrained())
    seq.on_slow_mask()
    assert mask_of(seq) is MaskLife.AWAITED
    seq.on_mask_ready(MASK, is_slow=True)
    assert seq.take_ready_mask() is MASK and mask_of(seq) is MaskLife.AWAITED
    seq.on_mask_ready(MASK, is_slow=False)
    seq.take_ready_mask()
    assert seq.mask is MaskLife.DUE and seq.ready_mask is None
    with pytest.raises(LifeError):
        seq.on_mask_ready(MASK, is_slow=False)
    assert seq.ready_mask is None, "a mask that nobody asked for is not kept"


def test_a_mask_built_ahead_is_forgotten_when_the_device_takes_over() -> None:
    seq = sequence(constraint=constrained())
    seq.on_slow_mask()
    seq.on_mask_ready(MASK, is_slow=True)
    seq.place_automaton(1)
    seq.place_automaton(0)
    assert seq.mask is MaskLife.DUE and seq.ready_mask is None


@pytest.mark.parametrize("state", MaskLife)
@pytest.mark.parametrize("to", MaskLife)
def test_every_other_move_of_a_mask_is_refused(state: MaskLife, to: MaskLife) -> None:
    if to in MASK_MOVES[state]:
        assert mask_moved(state, to) is to
    else:
        with pytest.raises(LifeError):
            mask_moved(state, to)
