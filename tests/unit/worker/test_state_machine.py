"""I1–I12 under random histories on the virtual clock: 200 seeds of 100 steps. The long run is `make soak`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.worker.machine import Loop


@pytest.mark.slow
def test_every_history_keeps_the_invariants() -> None:
    run_state_machine_as_test(
        Loop,
        settings=settings(
            max_examples=200,
            stateful_step_count=100,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
