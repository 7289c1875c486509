"""Random cancels and hang-ups against a real worker and gateway; the long run is `degas bench cancels`."""

from __future__ import annotations

import pytest

from loadtest.bench.cancels import run_cancels


@pytest.mark.slow
def test_cancels_leave_every_page_row_thread_and_descriptor_at_its_baseline() -> None:
    report = run_cancels(3000, hang_ups=100)
    assert report.is_clean, report
