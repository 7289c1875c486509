"""Owns what a person sees while Degas starts: bars on a terminal, plain lines otherwise; or JSON lines. Supervisor's loop only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from shared.logs import configure_logs

PLAIN_INTERVAL_S = 2.0  # between two lines about a phase's progress when there is no terminal

log = structlog.get_logger(__name__)


class StartupView:
    """Phases with their seconds, and progress where something is waited for."""

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._console = console or Console(highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told_s: dict[str, float] = {}

    def phase(self, role: str, name: str, seconds: float) -> None:
        """Show that a phase is over."""
        self._end_bar(f"{role} {name}")
        self._line(f"{role:<8} {name:<28} {seconds:7.2f} s")

    def progress(self, role: str, name: str, done: float, total: float) -> None:
        """Show how far a phase is."""
        if total <= 0:
            return
        key = f"{role} {name}"
        if self._console.is_terminal:
            bars = self._show_bars()
            if key not in self._tasks:
                self._tasks[key] = bars.add_task(f"{role:<8} {name}", total=total)
            bars.update(self._tasks[key], completed=done, total=total, refresh=True)
            if done >= total:
                self._end_bar(key)
            return
        if self._is_due(key):
            self._line(f"{role:<8} {name:<28} {100 * done / total:5.0f} %")

    def note(self, text: str, *, style: str = "") -> None:
        """Show one line of text."""
        self._line(text, style)

    def fault(self, text: str) -> None:
        """Say why `degas serve` ends."""
        self.close()
        print(f"degas serve: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bars."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    def _is_due(self, key: str) -> bool:
        """Whether it is time for another line about a phase's progress."""
        now_s = self._clock()
        if now_s - self._told_s.setdefault(key, now_s) < PLAIN_INTERVAL_S:
            return False
        self._told_s[key] = now_s
        return True

    def _show_bars(self) -> Progress:
        if self._bars is None:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
                auto_refresh=False,  # no refreshing thread in a process that forks
            )
            self._bars.start()
        return self._bars

    def _end_bar(self, key: str) -> None:
        task = self._tasks.pop(key, None)
        if task is not None and self._bars is not None:
            self._bars.remove_task(task)
            if not self._tasks:
                self.close()

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)
        self._console.file.flush()


class StartupLog(StartupView):
    """The same as lines of the log, like those of worker and gateway: for whoever collects a container's."""

    def phase(self, role: str, name: str, seconds: float) -> None:
        """See `StartupView`."""
        log.info("phase", role=role, phase=name, seconds=round(seconds, 2))

    def progress(self, role: str, name: str, done: float, total: float) -> None:
        """See `StartupView`."""
        if total > 0 and self._is_due(f"{role} {name}"):
            log.info("progress", role=role, phase=name, percent=round(100 * done / total))

    def note(self, text: str, *, style: str = "") -> None:
        """See `StartupView`: what is red there is an error, what is yellow a warning."""
        level = {"red": "error", "yellow": "warning"}.get(style, "info")
        getattr(log, level)("note", message=text.strip())

    def fault(self, text: str) -> None:
        """See `StartupView`."""
        log.error("giving_up", message=text)


def open_view(*, json: bool) -> StartupView:
    """What `degas serve` shows itself by; with `json` its log is set up."""
    if not json:
        return StartupView()
    configure_logs("serve", json=True)
    return StartupLog()
