"""Owns telling a person how far a start is, where no supervisor does: a bar on a terminal, else a log line now and then. Decode thread."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

import structlog

log = structlog.get_logger("worker.startup")

LINE_INTERVAL_S = 3.0  # between two log lines, and before the first: a quick start says nothing
BAR_INTERVAL_S = 0.1
BAR_CELLS = 30


class LoadingView:
    """A `ProgressReport` on `stream`, by default stderr."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._phase = ""
        self._told_s = 0.0

    def __call__(self, phase: str, done: float, total: float) -> None:
        """Show how far a phase is; a total of 0 says nothing."""
        if total <= 0:
            return
        now_s = self._clock()
        if phase != self._phase:
            self._phase, self._told_s = phase, now_s
        is_over = done >= total
        if self._stream.isatty():
            if is_over or now_s - self._told_s >= BAR_INTERVAL_S:
                self._told_s = now_s
                self._draw(done / total, is_over=is_over)
        elif not is_over and now_s - self._told_s >= LINE_INTERVAL_S:
            self._told_s = now_s
            log.info("starting", phase=phase, per_cent=int(100 * done / total))

    def _draw(self, share: float, *, is_over: bool) -> None:
        filled = int(share * BAR_CELLS)
        bar = "━" * filled + " " * (BAR_CELLS - filled)
        text = f"\r{self._phase:<16} {bar} {100 * share:3.0f} %"
        # The line goes when the phase is over: what is logged next begins at the margin.
        self._stream.write("\r" + " " * len(text) + "\r" if is_over else text)
        self._stream.flush()
