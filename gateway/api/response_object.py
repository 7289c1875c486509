"""Owns the response object as its lifecycle events repeat it: the request's echo, status, output, usage, timings. Gateway's loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.api.parameters import Json
from gateway.api.response_events import incomplete_details, usage_object
from gateway.api.response_items import OutputItem
from gateway.api.spoken import Reading
from gateway.errors import retry_after_s
from gateway.generation import End


@dataclass(frozen=True, slots=True)
class Opening:
    """The facts of a response that are fixed before its first token; every lifecycle event repeats `body`."""

    response_id: str
    model_id: str
    task: str  # text | detect | point
    body: Json
    stream_id: str | None = None
    reading: Reading = field(default_factory=Reading)


class ResponseObject:
    """One response, from its announcement on. `first_s` is set when its first token is shown."""

    __slots__ = ("_created_at", "_opening", "_started_s", "first_s")

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._created_at = int(time.time())  # the interface's own fields: Unix time, decides nothing
        self._started_s = time.monotonic()
        self.first_s = 0.0

    def at(
        self,
        status: str,
        items: Sequence[OutputItem] = (),
        end: End | None = None,
        error: Json | None = None,
    ) -> Json:
        """The response object as it stands: the request's echo, status, output, usage and Degas's timings."""
        response: Json = {
            "id": self._opening.response_id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": error,
            "incomplete_details": incomplete_details(end),
            "model": self._opening.model_id,
            "output": [] if end is None else [item.ended() for item in items],
            "usage": None if end is None else usage_object(end.usage),
            **self._opening.body,
        }
        if status == "completed":
            response["completed_at"] = int(time.time())  # the field is a date, in seconds since 1970
        if end is not None:
            response["degas"] = self._timings(end)
            if end.error is not None:
                response["degas"]["retry_after_s"] = retry_after_s(end.error)
        return response

    def _timings(self, end: End) -> Json:
        usage = end.usage
        now = time.monotonic()
        first_s = usage.time_to_first_token_s or (self.first_s - self._started_s if self.first_s else 0.0)
        streaming_s = now - self.first_s if self.first_s else 0.0
        decode_s = usage.decode_s or streaming_s
        rate = (
            (usage.completion_tokens - 1) / decode_s if decode_s > 0 and usage.completion_tokens > 1 else None
        )
        return {
            "task": self._opening.task,
            "finish_reason": end.reason.value,
            "time_to_first_token_s": round(first_s, 6),
            "total_s": round(now - self._started_s, 6),
            "queue_s": round(usage.queue_s, 6),
            "prefill_s": round(usage.prefill_s, 6),
            "decode_s": round(usage.decode_s, 6),
            "tokens_per_second": None if rate is None else round(rate, 2),
        }
