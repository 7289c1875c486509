"""The promise to clients under random histories of the whole service: 100 seeds of 100 steps."""

from __future__ import annotations

import pytest
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.histories import histories
from tests.unit.wire.machine import Service


@pytest.mark.slow
@pytest.mark.timeout(600)  # some fifteen seconds of processor time, whatever else the machine does
def test_every_history_keeps_the_promise() -> None:
    run_state_machine_as_test(Service, settings=histories(100))
