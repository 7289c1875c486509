"""The long runs: `make soak` (minutes). Their short forms are ordinary tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from loadtest.bench.cancels import run_cancels
from tests.unit.worker.loop.machine import Loop


def test_the_loop_through_many_long_histories() -> None:
    run_state_machine_as_test(
        Loop,
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
