"""What a person sees while Degas starts, with and without a terminal."""

from __future__ import annotations

import io

from rich.console import Console
from structlog.testing import capture_logs

from degas.startup_view import StartupLog, StartupView


def test_plain_lines_tell_long_phases_only_now_and_then() -> None:
    out, now_s = io.StringIO(), 0.0
    view = StartupView(Console(file=out, width=100), clock=lambda: now_s)
    for done in range(11):
        view.progress("worker", "load weights", done, 10)
        now_s += 0.9
    view.phase("worker", "load weights", 9.9)
    lines = out.getvalue().splitlines()
    assert [line.split()[-2] for line in lines] == ["30", "60", "90", "9.90"]


def test_a_terminal_gets_bars_that_go_away() -> None:
    out = io.StringIO()
    view = StartupView(Console(file=out, width=100, force_terminal=True))
    view.progress("worker", "warm up", 3, 10)
    assert "warm up" in out.getvalue() and "30 %" in out.getvalue()
    view.progress("worker", "warm up", 10, 10)
    view.phase("worker", "warm up", 1.25)
    view.progress("worker", "capture", 0, 0)  # nothing to show of a phase without a total
    view.close()
    assert "1.25 s" in out.getvalue() and "capture" not in out.getvalue()


def test_a_log_has_the_same_as_events() -> None:
    now_s = 0.0
    with capture_logs() as lines:
        view = StartupLog(Console(file=io.StringIO()), clock=lambda: now_s)
        for done in range(4):
            view.progress("worker", "load weights", done, 10)
            now_s += 1.5
        view.phase("worker", "load weights", 9.904)
        view.note("worker: no decode progress for 3.0 s; killing it", style="red")
        view.fault("the worker died 5 times in a row")
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("progress", "info"),
        ("phase", "info"),
        ("note", "error"),
        ("giving_up", "error"),
    ]
    assert lines[0]["percent"] == 20 and lines[1]["seconds"] == 9.9
