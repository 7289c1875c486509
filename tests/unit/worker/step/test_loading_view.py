"""A start that a person watches: a bar on a terminal, few lines elsewhere."""

from __future__ import annotations

import io

from structlog.testing import capture_logs

from worker.step.loading_view import LINE_INTERVAL_S, LoadingView


class Terminal(io.StringIO):
    """A stream that is one."""

    def isatty(self) -> bool:
        return True


def test_a_bar_that_goes_when_it_is_full() -> None:
    now, stream = [0.0], Terminal()
    view = LoadingView(stream, lambda: now[0])
    for done in range(11):
        view("weights", done, 10)
        now[0] += 1
    drawn = stream.getvalue().split("\r")
    assert any("weights" in line and " 50 %" in line for line in drawn) and not drawn[-1].strip()
    view("weights", 1, 0)
    assert stream.getvalue().split("\r") == drawn


def test_lines_at_most_every_few_seconds() -> None:
    now = [0.0]
    view = LoadingView(io.StringIO(), lambda: now[0])
    with capture_logs() as told:
        for done in range(100):
            view("weights", done, 100)
            now[0] += 0.25
        view("weights", 100, 100)
    assert 0 < len(told) <= 25 / LINE_INTERVAL_S
    assert told[0]["phase"] == "weights" and 0 < told[0]["per_cent"] < 100
