"""Owns how a request came in, for its trace span: each transport sets it, the core reads it. Gateway's loop."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Final, NamedTuple

TRACE_PARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII
)


class Caller(NamedTuple):
    """How a request came in: its matched route, its `traceparent` where it sent a valid one, and its key's handle."""

    route: str = ""
    trace_parent: str = ""
    key: str = ""


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - a tuple cannot change
"""Set by each transport for the task that serves a request; read when a sequence is submitted."""


def caller(route: str, trace_parent: str | None, key: str = "") -> Caller:
    """A `Caller`; a malformed `traceparent` counts as none, as the W3C recommendation wants it."""
    is_valid = trace_parent is not None and TRACE_PARENT.fullmatch(trace_parent)
    return Caller(route, (trace_parent or "") if is_valid else "", key)


def set_key(key: str) -> None:
    """The key is known now: what this task and those that it starts ask for is asked with it."""
    CALLER.set(CALLER.get()._replace(key=key))
