"""Owns how an unexpected exception is put into a log line: its type and its place in the code, never its message.

A message or a local variable may hold what a user wrote; a file name and a line number cannot.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Final

_MAX_FRAMES: Final = 8


def fault_fields(error: BaseException) -> dict[str, str]:
    """Log fields for an exception: `error`, its type, and `at`, its innermost frames, the raising one first."""
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames)]
    return {"error": type(error).__name__, "at": " < ".join(places)}
