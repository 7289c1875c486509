"""Owns what is said of one operation over HTTP. Read, never run: no thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from gateway.api.parameters import Json

SSE: Final = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method at one path. `answers` are by status; an answer that is no struct is (media type, what it is)."""

    method: str
    path: str
    tag: str
    summary: str
    text: str = ""
    body: Any = None
    example: Json | None = None
    answers: dict[int, Any] = field(default_factory=dict)
    stream: tuple[str, Any] | None = None  # media type, and the shape of one event's data or of one line
    errors: tuple[int, ...] = ()  # none: by what it is
    parameters: tuple[Json, ...] = ()
    needs_key: bool = True
    public: str | None = None  # the setting's name that opens it without a key
    socket: tuple[Any, Any] | None = None  # a WebSocket's messages: the client's, the server's
