"""Owns why a submission cannot become a sequence. Decode thread."""

from __future__ import annotations

from shared.errors import ErrorCode


class Refusal(Exception):
    """A submission that cannot become a sequence."""

    def __init__(self, code: ErrorCode, message: str, param: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
