"""The long runs: `make soak` (minutes). Their short forms are ordinary tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from loadtest.bench.cancels import run_cancels
from tests.unit.wire.machine import Service
from tests.unit.worker.loop.machine import Loop


@pytest.mark.parametrize("machine", [Loop, Service])
def test_many_long_histories(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("DEGAS_SOAK_EXAMPLES", "5000")),
            stateful_step_count=200,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_hundred_thousand_cancels_leave_nothing_behind() -> None:
    report = run_cancels(100_000, hang_ups=2000)
    assert report.is_clean, report
