"""I1–I12 under random histories on the virtual clock: 150 seeds of 100 steps. The long run is `make soak`."""

from __future__ import annotations

import pytest
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.histories import histories
from tests.unit.worker.loop.machine import Loop


@pytest.mark.slow
def test_every_history_keeps_the_invariants() -> None:
    run_state_machine_as_test(Loop, settings=histories(150))
